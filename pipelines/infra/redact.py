"""Remove paths of this machine from what others will read.

- `redact_text`: lines that clients of a service read. Paths become `…/<last part>`.
- `redact_values`: JSON that is published, such as a report. Paths become their last part.
- `redact_settings` and `redact_model_name`: recipes that are published with a model. Paths become `(a local path)`,
  because even the last part of a folder of recordings may be private.

URLs, `hub://` URIs, Hub ids and relative paths such as `runs/tour` stay as they are; only a recipe's settings that name
files are always replaced. Tokens are removed by stores.errors.redact_secrets.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipelines.infra import environment, stores

_PATH_IN_TEXT = re.compile(
    r"(?:file://|(?<![\w:/.~-]))(?:[~…](?:/[^\s/'\"`,;()\[\]]+)+|(?:/[^\s/'\"`,;()\[\]]+){2,})/?"
)
"""An absolute path of two parts or more that ends at the next space or quote: in a log line, text may follow."""
_PATH_IN_VALUE = re.compile(
    r"(?<![\w/\\.~<-])(?:file:[\\/]+|[A-Za-z]:[\\/]|~[\w.-]*[\\/]|(?:(?<!:)|(?!//))[\\/](?=\S))[^\n\"'<>|,;:()]*", re.I
)
"""An absolute path, POSIX or Windows, that may contain spaces: it extends to the next quote or punctuation mark."""
_ABSOLUTE = re.compile(r"(?:[\\/~]|[A-Za-z]:[\\/])")
LOCAL_PATH = "(a local path)"
"""What stands for a path of this machine in published settings."""
_MAX_LINE_CHARACTERS = 20_000
"""Longer lines are cut before patterns are matched with them."""
_FILE_SETTINGS = ("held_out", "sentences", "corrections", "exclude")
_MODEL_SETTINGS = ("base", "label_model", "agreement_model", "language_model", "aligner", "teacher")


def redact_text(text: str, *folders: str | Path) -> str:
    """Return `text`, at most _MAX_LINE_CHARACTERS of it, with each absolute path cut to `…/<last part>`.

    Paths below `folders`, the lab's folder and its cache become `…/<path below it>`.
    """
    text = text[:_MAX_LINE_CHARACTERS]
    for folder in _longest_first([*folders, environment.ROOT, environment.cache_folder()]):
        text = text.replace(folder, "…")
    return _PATH_IN_TEXT.sub(lambda match: f"…/{_last_part(match[0])}", text)


def redact_values(value: Any) -> Any:
    """Return a JSON value with each absolute path in its strings cut to the last part."""
    if isinstance(value, Mapping):
        return {name: redact_values(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redact_values(inner) for inner in value]
    if not isinstance(value, str):
        return value
    if _ABSOLUTE.match(value):
        return _last_part(value)
    return _PATH_IN_VALUE.sub(lambda match: _last_part(match[0]), value)


def redact_settings(value: Any, name: str = "", kind: str = "") -> Any:
    """Return a recipe's nested settings with "(a local path)" in place of each path of this machine.

    `name` is the setting that holds `value`, and `kind` the source that it belongs to.
    """
    if isinstance(value, Mapping):
        kind = value.get("kind", kind)
        return {inner: redact_settings(setting, inner, kind) for inner, setting in value.items()}
    if isinstance(value, list):
        return [redact_settings(item, name, kind) for item in value]
    if not isinstance(value, str) or not value:
        return value
    if (name == "path" and kind != "hub") or name in _FILE_SETTINGS:
        return LOCAL_PATH
    if name in _MODEL_SETTINGS:
        return redact_model_name(value)
    return LOCAL_PATH if _is_path(value) else value


def redact_model_name(name: str) -> str:
    """Return a model's name, or "(a local path)" if it is a folder of this machine."""
    return LOCAL_PATH if stores.is_local_path(name) or _is_path(name) else name


def _is_path(value: str) -> bool:
    """Return True for a path that starts like one, also behind `run:`."""
    return re.match(r"[./~\\]|[A-Za-z]:[\\/]", value.removeprefix("run:")) is not None


def _last_part(path: str) -> str:
    """Return the last part of a path, and a space if the path ends with one."""
    return re.split(r"[\\/]", path.rstrip("\\/ "))[-1] + " " * path.endswith(" ")


def _longest_first(folders: Iterable[str | Path]) -> list[str]:
    return sorted({name for folder in folders if len(name := str(folder).rstrip("/")) > 1}, key=len, reverse=True)
