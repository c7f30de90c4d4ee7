"""Options and helpers that the commands share."""

from __future__ import annotations

import json
import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines import recipes
from pipelines.infra import console
from pipelines.infra.errors import LabError
from pipelines.infra.parallel import distributed
from pipelines.recipes import settings as recipes_settings

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune Whisper for Swedish: features, training, evaluation, transcription.",
)

RecipeName = Annotated[str, typer.Option("--recipe", "-r", help="A recipe's name, or a .toml file of your own.")]
Overrides = Annotated[
    list[str],
    typer.Option("--set", "-s", metavar="NAME=VALUE", help="Override a setting, e.g. training.steps=60. Repeatable."),
]
Runs = Annotated[
    str, typer.Option("--runs", help="Folder for artefacts; default: LAB_RUNS, else runs/ in the project.")
]
CacheUri = Annotated[str, typer.Option("--cache", help="Feature cache; default: the one that `features` made last.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done and written, and end.")]


def _log_to_stderr(as_json: bool) -> bool:
    """Keep standard output for the JSON object."""
    if as_json and distributed.is_main_process():
        console.configure(sys.stderr)
    return as_json


Json = Annotated[
    bool,
    typer.Option(
        "--json",
        callback=_log_to_stderr,
        is_eager=True,
        help="Print one JSON object on standard output; all else goes to standard error.",
    ),
]


class ScoredSplit(StrEnum):
    """Splits that are scored; training clips are not."""

    validation = "validation"
    test = "test"


def _recipe(name: str, assignments: list[str]) -> tuple[recipes_settings.Recipe, dict[str, Any]]:
    """The recipe with `NAME=VALUE` overrides, and the overrides as a dictionary."""
    overrides = dict(_assignment(text) for text in assignments)
    return recipes.load(name, overrides), overrides


def _again(recipe: str, set_: list[str], runs: str) -> str:
    """The options that name the same experiment in the next command."""
    told = ["--recipe", recipe, *(word for assignment in set_ for word in ("--set", assignment))]
    return shlex.join([*told, *(("--runs", runs) if runs else ())])


def _assignment(text: str) -> tuple[str, Any]:
    """`a.b=1` as ("a.b", 1): the value is JSON where it parses as such, else a string.

    A setting that is a string takes the text as it stands, `2024` and `true` included; quotes around it are JSON's.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise LabError(f"--set takes NAME=VALUE such as training.steps=60, got {text!r}")
    name = name.strip()
    try:
        parsed = json.loads(value)
    except ValueError:
        return name, value
    return name, value if recipes.takes_text(name) and not isinstance(parsed, str) else parsed


def _plan(as_json: bool, settings: recipes_settings.Recipe, where: str | Path, what: str) -> None:
    _print(
        as_json,
        {"dry_run": True, "would": what, "writes": str(where), "recipe": settings.settings()},
        f"would {what}\nwould write below {where}\nnothing was done",
    )


def _print(as_json: bool, told: dict[str, Any], words: str) -> None:
    print(json.dumps(told, ensure_ascii=False) if as_json else words)
