"""Every command of README.md and of the pages below docs/ is run, in a copy of the lab whose recipes are small."""

from __future__ import annotations

import contextlib
import re
import socket
import time
from pathlib import Path

import pages
import pytest
from desk import PATIENCE_S, Reader
from pages import Command
from servers.loopback import free_port

NOT_RUN = {
    r"docker (build|run) ": "an engine is wanted; tests/inference/deploy/test_dockerfile.py reads the file",
    r"python benchmarks/\w+\.py": "it measures for minutes to hours; tests/test_benchmarks.py runs it in small",
}
"""Commands that no test runs, and why."""
FIRST = {  # page to commands
    "experiments.md": [
        "python -m pipelines features --recipe tour-lora",
        "python -m pipelines train --recipe tour-lora",
        "python -m pipelines evaluate --recipe tour-lora",
    ],
    "smaller-models.md": ["python -m pipelines features --recipe mine.toml"],
    "training.md": ["python -m pipelines features --recipe base"],
}
"""What the readers of these pages have done before."""


def not_run(command: Command) -> list[str]:
    """The entries of NOT_RUN that a command falls under."""
    return [pattern for pattern in NOT_RUN if re.match(pattern, command.text)]


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_runs(desk, page: Path):
    desk.begin()
    reader = Reader(desk)
    try:
        for command in [Command(text, account=True) for text in FIRST.get(page.name, ())] + pages.commands(page):
            if not (not_run(command) or pages.ON_A_CLUSTER.search(command.text)):
                reader.run(command)
    finally:
        reader.close()


def test_what_is_not_run_is_on_a_page():
    named = [command for page in pages.PAGES for command in pages.commands(page)]
    assert {pattern for command in named for pattern in not_run(command)} == NOT_RUN.keys()


def test_a_benchmark_that_a_page_names_has_these_options():
    """They are not run, but neither do they promise what is not there."""
    for command in (command for page in pages.PAGES for command in pages.commands(page)):
        if command.text.startswith("python benchmarks/"):
            _, file, *words = command.words
            options = re.findall(r"\"(--[\w-]+)\"", (pages.ROOT / file).read_text("utf-8"))
            assert {word for word in words if word.startswith("--")} <= set(options), command.text


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
def test_a_command_that_fails_is_found(desk, text: str):
    """Those that need an account, too: without a line that says so their block has none."""
    desk.begin()
    with pytest.raises(AssertionError):
        Reader(desk).run(Command(text))


def test_the_files_of_the_worker_s_page_serve_another_model(desk):
    mine, served = pages.blocks((pages.ROOT / "docs" / "worker.md").read_text("utf-8"), "python")
    (desk.folder / "mine.py").write_text(mine, "utf-8")
    (desk.folder / "serve_mine.py").write_text(served.replace("8001", str(port := free_port())), "utf-8")
    reader = Reader(desk)
    reader.server, reader.address = desk.start("python serve_mine.py"), f"http://127.0.0.1:{port}"
    try:
        until_it_listens(port)
        reader.run(Command("curl http://127.0.0.1:8001/status"))
        reader.run(
            Command("""curl -H 'Content-Type: application/json' -d '{"task": "dataset"}' http://127.0.0.1:8001""")
        )
    finally:
        reader.close()


def until_it_listens(port: int) -> None:
    ends = time.monotonic() + PATIENCE_S
    while time.monotonic() < ends:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.05)
