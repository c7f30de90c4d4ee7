"""Run every command of README.md, CONTRIBUTING.md and docs/ in a copy of the lab whose recipes are small."""

from __future__ import annotations

import contextlib
import re
import socket
import time
from pathlib import Path

import pages
import pytest
from command_runner import NO_EFFECT, CommandRunner
from lab_copy import TIMEOUT_S, python_words
from pages import Command
from servers.loopback import free_port

pytestmark = pytest.mark.slow
NOT_RUN = {
    r"docker (build|run) ": "needs a Docker engine; tests/inference/deploy/test_dockerfile.py reads the file",
    r"python benchmarks/\w+\.py": "takes minutes to hours; tests/test_benchmarks.py runs them in small",
    r"python -m pytest ": "runs the tests themselves",
}
"""Commands that no test runs, and why."""
FIRST = {
    "benchmarks.md": ["python -m pipelines features --recipe tour"],
    "experiments.md": [
        "python -m pipelines features --recipe tour-lora",
        "python -m pipelines train --recipe tour-lora",
        "python -m pipelines evaluate --recipe tour-lora",
    ],
    "guards.md": ["python -m pipelines features --recipe tour", "python -m pipelines train --recipe tour"],
    "smaller-models.md": ["python -m pipelines features --recipe mine.toml"],
    "training.md": ["python -m pipelines features --recipe base"],
}
"""Page to the commands that its readers have run before."""


def not_run(command: Command) -> list[str]:
    """Return the patterns of NOT_RUN that match a command."""
    return [pattern for pattern in NOT_RUN if re.match(pattern, command.text)]


def is_run_here(command: Command) -> bool:
    return not (not_run(command) or pages.ON_A_CLUSTER.search(command.text))


@pytest.fixture(scope="module")
def completed() -> set[str]:
    """The commands without effect that an earlier page has run."""
    return set()


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: page.name)
def test_commands_of_page_run(lab_copy, completed: set[str], page: Path):
    lab_copy.reset()
    runner = CommandRunner(lab_copy)
    try:
        for command in [Command(text, account=True) for text in FIRST.get(page.name, ())] + pages.commands(page):
            if is_run_here(command) and command.text not in completed:
                runner.run(command)
                if NO_EFFECT.match(command.text):
                    completed.add(command.text)
    finally:
        runner.close()


def test_every_excluded_command_is_on_a_page():
    commands = [command for page in pages.PAGES for command in pages.commands(page)]
    assert {pattern for command in commands for pattern in not_run(command)} == NOT_RUN.keys()


def test_documented_benchmarks_have_their_options():
    for command in (command for page in pages.PAGES for command in pages.commands(page)):
        if command.text.startswith("python benchmarks/"):
            _, file, *words = command.words
            options = re.findall(r"\"(--[\w-]+)\"", (pages.ROOT / file).read_text("utf-8"))
            assert {word for word in words if word.startswith("--")} <= set(options), command.text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("python app.py --port 1", ["app.py", "--port", "1"]),
        ("python -m pipelines run --set 'a=[1]'", ["-m", "pipelines", "run", "--set", "a=[1]"]),
        (".venv/bin/python -m pipelines doctor", ["-m", "pipelines", "doctor"]),
        ("papermill in.ipynb out.ipynb", ["-m", "papermill", "in.ipynb", "out.ipynb"]),
        ("python -c 'print(1)' 2", None),
        ("A=1 python app.py", None),
        ("python app.py | head", None),
        ("make run", None),
    ],
)
def test_only_plain_python_programs_are_forked(text: str, words: list[str] | None):
    assert python_words(text) == words


@pytest.mark.parametrize(
    "text",
    [
        "python -m pipelines trian",
        "python -m pipelines train --recipe tuor",
        "python -m pipelines train --set training.stepz=3",
        "python -m pipelines fetch hub://me/whisper-sv",
        "python -m pipelines publish runs/tour/train-1a2b3c4d5e6f/model hub://me/whisper-sv",
        "python -m pipelines features --recipe base",
        "python app.py --prot 7860",
        "papermill notebooks/01_feature_pipeline.ipynb out.ipynb -p recpie tour",
        "torchrun --nproc-per-node gpu -m pipelines trian",
        "make rnu",
        "make run RECPIE=tour",
        "pip install 'onnx>=99'",
        "frobnicate",
    ],
)
def test_wrong_command_fails(lab_copy, text: str):
    """Commands that need an account fail, too, if their block does not say so."""
    lab_copy.reset()
    with pytest.raises(AssertionError):
        CommandRunner(lab_copy).run(Command(text))


def test_worker_page_code_serves_another_model(lab_copy):
    model, serve = pages.blocks((pages.ROOT / "docs" / "worker.md").read_text("utf-8"), "python")
    (lab_copy.folder / "mine.py").write_text(model, "utf-8")
    (lab_copy.folder / "serve_mine.py").write_text(serve.replace("8001", str(port := free_port())), "utf-8")
    runner = CommandRunner(lab_copy)
    runner.server, runner.address = lab_copy.start("python serve_mine.py"), f"http://127.0.0.1:{port}"
    try:
        wait_until_listening(port)
        runner.run(Command("curl http://127.0.0.1:8001/status"))
        runner.run(
            Command("""curl -H 'Content-Type: application/json' -d '{"task": "dataset"}' http://127.0.0.1:8001""")
        )
    finally:
        runner.close()


def wait_until_listening(port: int) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.05)
