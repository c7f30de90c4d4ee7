"""What a line may not tell a client: where things lie on this machine."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipelines.infra import environment, stores

_PATH = re.compile(r"(?:file://|(?<![\w:/.~-]))(?:[~…](?:/[^\s/'\"`,;()\[\]]+)+|(?:/[^\s/'\"`,;()\[\]]+){2,})/?")
"""An absolute path of two parts or more; the path of a URL is none."""


def redact_text(text: str, *folders: str | Path) -> str:
    """`text` with every absolute path cut to its last part, and `folders` and those below the lab's own shortened."""
    for folder in _longest_first([*folders, environment.ROOT, environment.cache_folder()]):
        text = text.replace(folder, "…")
    return _PATH.sub(lambda found: f"…/{found[0].rstrip('/').rpartition('/')[2]}", text)


def _longest_first(folders: Iterable[str | Path]) -> list[str]:
    return sorted({name for folder in folders if len(name := str(folder).rstrip("/")) > 1}, key=len, reverse=True)


_ABSOLUTE = re.compile(r"(?:[\\/~]|[A-Za-z]:[\\/])")
_WITHIN = re.compile(
    r"(?<![\w/\\.~<-])(?:file:[\\/]+|[A-Za-z]:[\\/]|~[\w.-]*[\\/]|(?:(?<!:)|(?!//))[\\/](?=\S))[^\n\"'<>|,;:()]*", re.I
)
"""An absolute path within a string, as far as it may go; no slash of hub://owner/name or of owner/name begins one."""


def redact_values(value: Any) -> Any:
    """The value with every absolute path in it cut to its last part: whose machine it was is nobody's business."""
    if isinstance(value, Mapping):
        return {name: redact_values(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redact_values(inner) for inner in value]
    if isinstance(value, str):
        return (
            _last_path_part(value)
            if _ABSOLUTE.match(value)
            else _WITHIN.sub(lambda path: _last_path_part(path[0]), value)
        )
    return value


def _last_path_part(path: str) -> str:
    """The last part of a path, and a blank where one follows."""
    bare = path.rstrip("\\/ ")
    return re.split(r"[\\/]", bare)[-1] + " " * path.endswith(" ")


_PLACE = "(a local path)"


def redact_settings(value: Any, name: str = "", kind: str = "") -> Any:
    """The recipe (its settings, nested) with a word in the place of every path of the trainer's machine."""
    if isinstance(value, Mapping):
        kind = value.get("kind", kind)
        return {inner: redact_settings(told, inner, kind) for inner, told in value.items()}
    if isinstance(value, list):
        return [redact_settings(told, name, kind) for told in value]
    local = (name == "path" and kind != "hub") or name in ("held_out", "sentences")
    if not isinstance(value, str) or not value:
        return value
    local = local or (name in ("base", "label_model", "teacher") and stores.is_folder(value))
    return _PLACE if local or _looks_like_a_place(value.removeprefix("run:")) else value


def _looks_like_a_place(value: str) -> bool:
    return value.startswith((".", "/", "~", "\\")) or bool(re.match(r"[A-Za-z]:[\\/]", value))
