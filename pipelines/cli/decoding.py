"""Options of commands that decode, and the decoding options that they name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.infra.errors import LabError

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


def changes(
    temperature: str = "",
    hotwords: str = "",
    vocabulary: Path | None = None,
    suppress_tokens: str = "",
    prompt: str = "",
    **numbers: Any,
) -> dict[str, Any]:
    """Return the fields of DecodingOptions that a command line changes. Raises LabError for what is no number."""
    words = [word.strip() for word in hotwords.split(",") if word.strip()]
    if vocabulary:
        words += read_vocabulary(vocabulary)
    fields = {
        "temperatures": _numbers("--temperature", temperature, float),
        "suppress_tokens": _numbers("--suppress-tokens", suppress_tokens, int),
        "hotwords": tuple(words) or None,
        "prompt": prompt or None,
        **numbers,
    }
    return {name: value for name, value in fields.items() if value is not None}


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
