"""Every command of README.md and of the pages below docs/ is run, in a copy of the lab whose recipes are small."""

from __future__ import annotations

import re
from pathlib import Path

import pages
import pytest
from desk import Reader
from pages import Command

NOT_RUN = {
    r"docker (build|run) ": "an engine is wanted; tests/test_dockerfile.py reads the file",
    r"python benchmarks/\w+\.py": "it measures for minutes to hours; tests/test_benchmarks.py runs it in small",
}
"""Commands that no test runs, and why."""
ON_A_CLUSTER = re.compile(r"^ray |--cluster\b")
"""Run by tests/test_commands_cluster.py."""
FIRST = {
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
            if not (not_run(command) or ON_A_CLUSTER.search(command.text)):
                reader.run(command)
    finally:
        reader.close()
