"""Read the documentation pages: their code blocks, their commands, their code spans."""

from __future__ import annotations

import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SHELLS = ("bash", "sh", "shell", "console")
ACCOUNT = re.compile(r"^# needs an account\b", flags=re.MULTILINE)
ON_A_CLUSTER = re.compile(r"^ray |--cluster\b")
"""Commands that tests/cli/test_commands_cluster.py runs. tests/cli/test_commands.py runs the others."""


@dataclass(frozen=True)
class Command:
    """A shell command of a page."""

    text: str
    """The line without its comment."""
    account: bool = False
    """Whether its code block says that it needs an account."""

    @property
    def words(self) -> list[str]:
        """The command split as a shell does."""
        return shlex.split(self.text)


def blocks(markdown: str, *languages: str) -> list[str]:
    """Return the fenced code blocks in these languages, also those inside lists."""
    fenced = re.findall(r"^ *```(\w+)\n(.*?)^ *```$", markdown, flags=re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(block) for language, block in fenced if language in languages]


def prose(markdown: str) -> str:
    """Return the text without its code blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", markdown, flags=re.MULTILINE | re.DOTALL)


def spans(markdown: str) -> list[str]:
    """Return the code spans (between backticks) outside of code blocks."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(markdown))


def block_commands(markdown: str) -> list[Command]:
    """Return every command of every shell block; in a console block, the lines after a prompt."""
    commands = []
    for block in blocks(markdown, *SHELLS):
        lines = block.replace("\\\n", " ").splitlines()
        if any(line.startswith("$ ") for line in lines):
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        texts = [_without_comment(line) for line in lines]
        commands += [Command(text, bool(ACCOUNT.search(block))) for text in texts if text]
    return commands


def _without_comment(line: str) -> str:
    """Return the command of a line. As in a shell, `#` starts a comment only at the start of a word."""
    expected = shlex.split(line, comments=True)
    ends = [match.start() for match in re.finditer(r"(^|(?<=\s))#", line)] + [len(line)]
    for end in ends:
        try:
            if shlex.split(line[:end]) == expected:
                return line[:end].strip()
        except ValueError:  # the # is inside quotes
            continue
    raise ValueError(f"not a shell command: {line}")


def inline_commands(markdown: str) -> list[Command]:
    """Return the code spans that start like a command and have an argument."""
    starts = r"(make|papermill|pip|python -m|python app\.py) \S|python benchmarks/\S"
    return [Command(span) for span in spans(markdown) if re.match(starts, span)]


def commands(page: Path) -> list[Command]:
    """Return the commands of a page in order, blocks before code spans, each once."""
    markdown = page.read_text("utf-8")
    return list(dict.fromkeys([*block_commands(markdown), *inline_commands(markdown)]))
