"""Readers of README.md and the pages below docs/: their code blocks, their commands, what stands between backticks."""

from __future__ import annotations

import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
SHELLS = ("bash", "sh", "shell", "console")
ACCOUNT = re.compile(r"^# needs an account\b", flags=re.MULTILINE)
ON_A_CLUSTER = re.compile(r"^ray |--cluster\b")
"""Commands that tests/test_commands_cluster.py runs, and tests/test_commands.py the others."""


@dataclass(frozen=True)
class Command:
    """A line of a page for the shell."""

    text: str
    """As it stands there, without its comment."""
    account: bool = False
    """Whether its block says that it needs one."""

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)


def blocks(markdown: str, *kinds: str) -> list[str]:
    """The fenced blocks of these kinds, also those inside a list."""
    fenced = re.findall(r"^ *```(\w+)\n(.*?)^ *```$", markdown, flags=re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(block) for kind, block in fenced if kind in kinds]


def prose(markdown: str) -> str:
    """The text without its code blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", markdown, flags=re.MULTILINE | re.DOTALL)


def spans(markdown: str) -> list[str]:
    """What stands between backticks in running text."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(markdown))


def block_commands(markdown: str) -> list[Command]:
    """Every command of every shell block; in a console block, the lines after a prompt."""
    found = []
    for block in blocks(markdown, *SHELLS):
        lines = block.replace("\\\n", " ").splitlines()
        if any(line.startswith("$ ") for line in lines):
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        texts = [_without_comment(line) for line in lines]
        found += [Command(text, bool(ACCOUNT.search(block))) for text in texts if text]
    return found


def _without_comment(line: str) -> str:
    """The command of a line: as the shell sees it, `#` begins a comment where a word would begin."""
    wanted = shlex.split(line, comments=True)
    ends = [match.start() for match in re.finditer(r"(^|(?<=\s))#", line)] + [len(line)]
    for end in ends:
        try:
            if shlex.split(line[:end]) == wanted:
                return line[:end].strip()
        except ValueError:  # inside quotes
            continue
    raise ValueError(f"not a line for the shell: {line}")


def inline_commands(markdown: str) -> list[Command]:
    """Commands between backticks in running text: those that begin as one and name something."""
    begins = r"(make|papermill|pip|python -m|python app\.py) \S|python benchmarks/\S"
    return [Command(span) for span in spans(markdown) if re.match(begins, span)]


def commands(page: Path) -> list[Command]:
    """Those of a page in their order, blocks before running text, each once."""
    markdown = page.read_text("utf-8")
    return list(dict.fromkeys([*block_commands(markdown), *inline_commands(markdown)]))
