"""Parse the commands that messages suggest, as a shell and the command line would, without running them."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

import typer

from pipelines import __main__ as cli
from pipelines.cli.options import load_recipe
from pipelines.recipes.settings import Recipe


@dataclass(frozen=True)
class Pasted:
    """One command and its parameters."""

    name: str
    params: dict[str, Any]

    @property
    def recipe(self) -> Recipe:
        return load_recipe(self.params["recipe"], self.params["set_"])


def parse(line: str) -> list[Pasted]:
    """Return the commands of a line that were joined by `&&`; fails if the command line refuses one."""
    group, commands, words = typer.main.get_command(cli.app), [], shlex.split(line.removeprefix("Next: "))
    while words:
        end = words.index("&&") if "&&" in words else len(words)
        part, words = words[:end], words[end + 1 :]
        assert part[:3] == ["python", "-m", "pipelines"], line
        commands.append(Pasted(part[3], group.commands[part[3]].make_context(part[3], part[4:]).params))
    return commands
