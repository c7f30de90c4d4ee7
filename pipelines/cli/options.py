"""Options that several commands share, and how commands print their results."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines import recipes
from pipelines.infra import console
from pipelines.infra.errors import LabError
from pipelines.infra.parallel import distributed
from pipelines.recipes import languages
from pipelines.recipes.settings import Recipe

LOCAL_HOSTS = ("127.0.0.1", "::1", "localhost")


def _log_to_stderr(as_json: bool) -> bool:
    """Send messages to standard error, so that standard output holds only the JSON object."""
    if as_json and distributed.is_main_process():
        console.configure(sys.stderr)
    return as_json


RecipeName = Annotated[str, typer.Option("--recipe", "-r", help="Name of a recipe, or path of a .toml file.")]
Overrides = Annotated[
    list[str],
    typer.Option("--set", "-s", metavar="NAME=VALUE", help="Override a setting, e.g. training.steps=60. Repeatable."),
]
Runs = Annotated[
    str, typer.Option("--runs", help="Folder for artefacts; default: LAB_RUNS, else runs/ in the project.")
]
CacheUri = Annotated[str, typer.Option("--cache", help="URI of a feature cache; default: the recipe's newest cache.")]
ModelUri = Annotated[str, typer.Option("--model", help="Model URI; default: the newest finished run, else the base.")]
Language = Annotated[
    str,
    typer.Option(
        "--language",
        callback=languages.parse_optional,
        help="A language, such as sv, sv-SE or Swedish; default: the one that the model was tuned for.",
    ),
]


LanguageOrAuto = Annotated[
    str,
    typer.Option(
        "--language",
        callback=languages.parse_or_auto,
        help="A language, such as sv, sv-SE or Swedish; auto: detected in each recording (multilingual base models); "
        "default: the one that the model was tuned for, else sv.",
    ),
]
EngineName = Annotated[str, typer.Option("--engine", help="auto, transformers, ctranslate2 or onnx.")]
Host = Annotated[str, typer.Option("--host", help="Address to listen on; 0.0.0.0 is every network of this machine.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done and written, and exit.")]
Json = Annotated[
    bool,
    typer.Option(
        "--json",
        callback=_log_to_stderr,
        is_eager=True,
        help="Print one JSON object on standard output; messages go to standard error.",
    ),
]


class ScoredSplit(StrEnum):
    """Splits that can be scored; training clips are not."""

    validation = "validation"
    test = "test"


def load_recipe(name: str, assignments: list[str]) -> Recipe:
    """Return the recipe with `NAME=VALUE` overrides applied."""
    return recipes.load(name, parse_overrides(assignments))


def parse_overrides(assignments: list[str]) -> dict[str, Any]:
    """Return `NAME=VALUE` texts as a dictionary of settings."""
    return dict(_parse_override(text) for text in assignments)


def _parse_override(text: str) -> tuple[str, Any]:
    """Return `a.b=1` as ("a.b", 1): the value is parsed as JSON where possible, else it is a string.

    A setting of type string takes the text unchanged, `2024` and `true` included, unless it is a quoted JSON string.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise LabError(f"--set takes NAME=VALUE such as training.steps=60, got {text!r}")
    name = name.strip()
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        return name, value
    return name, value if recipes.is_text_setting(name) and not isinstance(parsed, str) else parsed


def split_list(text: str) -> list[str]:
    """Return the items of a comma-separated option."""
    return [item.strip() for item in text.split(",") if item.strip()]


def parse_seeds(seeds: str) -> list[int]:
    """Return `42,43` as a list of different integers."""
    try:
        return [*dict.fromkeys(int(seed) for seed in seeds.split(","))]
    except ValueError:
        raise LabError(f"--seeds takes whole numbers such as 42,43, got {seeds!r}") from None


def print_result(as_json: bool, fields: dict[str, Any], text: str) -> None:
    """Print a command's result: `fields` as one JSON object, or `text` for people."""
    print(json.dumps(fields, ensure_ascii=False) if as_json else text)


def print_plan(as_json: bool, action: str, path: str | Path, recipe: Recipe | None = None) -> None:
    """Print what a command would do and where it would write."""
    fields = {"dry_run": True, "would": action, "writes": str(path)}
    if recipe:
        fields["recipe"] = recipe.settings()
    print_result(as_json, fields, f"would {action}\nwould write below {path}\nnothing was done")


def print_address(as_json: bool, fields: dict[str, Any], text: str) -> None:
    """Print the address of a server at once: programs that start it wait for this line."""
    print_result(as_json, fields, text)
    sys.stdout.flush()


def warn_without_token(token: str, host: str) -> None:
    """Warn on standard error if the server can be reached from other machines without a token."""
    if not token and host not in LOCAL_HOSTS:
        print("warning: anyone who can reach this port may use it; LAB_API_TOKEN sets a token", file=sys.stderr)


# ---- decoding

_PANEL = "Decoding (defaults: those that suit the model)"


def _option(help_: str, metavar: str | None = None) -> Any:
    return typer.Option(help=help_, metavar=metavar, show_default=False, rich_help_panel=_PANEL)


Task = Annotated[str, _option("transcribe, or translate to English (multilingual models that were not fine-tuned).")]
BeamSize = Annotated[int | None, _option("Hypotheses that are extended side by side; 1 decodes greedily.")]
Patience = Annotated[float | None, _option("Search until beam size times this number of hypotheses have ended.")]
LengthPenalty = Annotated[float | None, _option("Power of the length in the ranking of hypotheses.")]
Temperature = Annotated[
    str, _option("One, or several that are tried in turn if a text fails; default: 0 to 1 in steps of 0.2.", "T,T,...")
]
Prompt = Annotated[str, _option("Text before the recording, for spelling and style; up to 223 tokens.")]
Hotwords = Annotated[str, _option("Words and phrases to prefer, such as names.", "WORD,WORD")]
Vocabulary = Annotated[Path | None, _option("Text file with a hotword or phrase in each line.", "FILE")]
SuppressTokens = Annotated[str, _option("Token ids that are never written, besides the model's own list.", "ID,ID")]


def decoding_changes(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of DecodingOptions that a command's `arguments` change.

    Raises LabError for a value out of range, before a model is loaded.
    """
    from pipelines.whisper.decoding_options import DecodingOptions

    words = split_list(arguments["hotwords"])
    if arguments["vocabulary"]:
        words += read_vocabulary(arguments["vocabulary"])
    fields = {
        "temperatures": _numbers("--temperature", arguments["temperature"], float),
        "suppress_tokens": _numbers("--suppress-tokens", arguments["suppress_tokens"], int),
        "hotwords": tuple(words) or None,
        "prompt": arguments["prompt"] or None,
        **{name: arguments[name] for name in ("task", "beam_size", "patience", "length_penalty")},
    }
    changes = {name: value for name, value in fields.items() if value is not None}
    DecodingOptions().changed(**changes)
    return changes


def read_vocabulary(path: Path) -> list[str]:
    """Return the lines of a text file in UTF-8 that are not empty. Raises LabError if it cannot be read."""
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise LabError(f"--vocabulary must be a text file with a word in each line, got {path}: {reason}") from None
    return [line.strip() for line in lines if line.strip()]


def _numbers(option: str, text: str, kind: type) -> tuple[Any, ...] | None:
    if not text.strip():
        return None
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        name = "whole numbers" if kind is int else "numbers"
        raise LabError(f"{option} must be {name}, separated by commas, got {text!r}") from None
