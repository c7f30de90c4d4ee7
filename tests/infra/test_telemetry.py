"""No dependency reports usage: what commands write below the home folder, and where they connect."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.infra import telemetry

ROOT = Path(__file__).parents[2]
COMMANDS = """
features --recipe {recipe}
train --recipe {recipe}
evaluate --recipe {recipe}
evaluate --recipe {recipe} --model {base}
leaderboard toy
compare toy --out {folder}/compared
sweep --recipe {recipe} --set search.trials=2 --set search.sampler=tpe --set training.steps=4 \
--set search.space.training.learning_rate.kind=loguniform \
--set search.space.training.learning_rate.low=1e-4 --set search.space.training.learning_rate.high=1e-3
transcribe {wav} --model {model} --engine transformers
transcribe {wav} --model {model} --engine onnx
transcribe {wav} --model {model} --engine ctranslate2
export {model} --recipe {recipe} --to onnx-int8
production {model} --to {folder}/served --form onnx-int8
publish {model} {folder}/published
fetch {folder}/published
recipe tour
doctor --model {base}
"""
SERVERS = ("-m pipelines serve --model {model} --port 0", "-m pipelines worker --port 0", "app.py --model {model}")
RECORDER = """
import json, os, sys

def record(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        address = arguments[1] if event != "socket.getaddrinfo" else arguments[:2]
        if isinstance(address, tuple) and str(address[0]) not in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "None"):
            with open(os.environ["RECORD"], "a") as file:
                file.write(f"{event} {address} {sys.argv}\\n")

sys.addaudithook(record)
"""
RUN_ALL = """
import json, sys
from pipelines.__main__ import app
for words in json.loads(sys.argv[1]):
    sys.argv = ["pipelines", *words]
    app(words, standalone_mode=False)
"""


def test_importing_the_package_switches_reports_off():
    code = f"import os, pipelines; print(all(os.environ[name] for name in {[*telemetry.VARIABLES]}))"
    environment = {name: value for name, value in os.environ.items() if name not in telemetry.VARIABLES}
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        ).stdout
        == "True\n"
    )


def test_variables_of_the_user_are_kept(monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")
    telemetry.switch_off()
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "0"


@pytest.fixture
def machine(tmp_path):
    """Environment of a user with an empty home folder, whose processes record their connections."""
    (tmp_path / "home").mkdir()
    (tmp_path / "hooks").mkdir()
    (tmp_path / "hooks/sitecustomize.py").write_text(RECORDER)
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "OMP_NUM_THREADS") if name in os.environ}
    return kept | {
        "HOME": str(tmp_path / "home"),
        "TMPDIR": str(_created(tmp_path / "tmp")),
        "RECORD": str(tmp_path / "connections.txt"),
        "PYTHONPATH": f"{tmp_path / 'hooks'}:{ROOT}",
        "LAB_CACHE": str(tmp_path / "cache"),
        "LAB_RUNS": str(tmp_path / "runs"),
        "LAB_LOG": str(tmp_path / "log.csv"),
        "HF_ENDPOINT": "http://127.0.0.1:9",  # nothing listens: looking for the Hub is no report
    }


@pytest.mark.slow
def test_no_command_reports_to_a_server(machine, tmp_path, toy_recipe, toy_model, encoded, speech):
    recipe = tmp_path / "mine.toml"
    settings = toy_recipe.read_text("utf-8").replace("steps = 12", "steps = 4")
    recipe.write_text(f'{settings}\n[model]\nbase = "{toy_model}"\n')
    (tmp_path / "talk.wav").write_bytes(encoded(speech(32_000)))
    names = {"recipe": recipe, "base": toy_model, "wav": tmp_path / "talk.wav", "folder": tmp_path}
    first, *rest = COMMANDS.strip().splitlines()
    _run(machine, [first, *rest[:1]], names)
    (model,) = (tmp_path / "runs").glob("toy/train-*/model")
    names["model"] = model
    _run(machine, rest[1:], names)
    for server in SERVERS:
        _serve(machine, shlex.split(server.format(**names)))
    assert not Path(machine["RECORD"]).exists(), Path(machine["RECORD"]).read_text()
    home = tmp_path / "home"
    files = {path.relative_to(home).as_posix() for path in home.rglob("*") if path.is_file()}
    assert [name for name in files if not name.startswith(".cache/matplotlib/fontlist")] == []


def _run(machine: dict[str, str], commands: list[str], names: dict[str, Path]) -> None:
    """Run commands one after another in one process: importing takes longer than most of them."""
    words = [shlex.split(command.format(**names)) for command in commands]
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL, json.dumps(words)], cwd=ROOT, env=machine, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _serve(machine: dict[str, str], words: list[str]) -> None:
    """Start a server, wait for its address, and end it."""
    process = subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, env=machine, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "http://" in line:
                break
        else:
            raise AssertionError("".join(lines))
    finally:
        process.terminate()
        process.wait()


def _created(folder: Path) -> Path:
    folder.mkdir()
    return folder
