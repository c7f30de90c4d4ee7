"""What a line may not tell a client: where things lie on this machine."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from pipelines import environment

_PATH = re.compile(r"(?:file://|(?<![\w:/.~-]))(?:[~…](?:/[^\s/'\"`,;()\[\]]+)+|(?:/[^\s/'\"`,;()\[\]]+){2,})/?")
"""An absolute path of two parts or more; the path of a URL is none."""


def without_places(text: str, *folders: str | Path) -> str:
    """`text` with every absolute path cut to its last part, and `folders` and those below the lab's own shortened."""
    for folder in _longest_first([*folders, environment.ROOT, environment.cache_folder()]):
        text = text.replace(folder, "…")
    return _PATH.sub(lambda found: f"…/{found[0].rstrip('/').rpartition('/')[2]}", text)


def _longest_first(folders: Iterable[str | Path]) -> list[str]:
    return sorted({name for folder in folders if len(name := str(folder).rstrip("/")) > 1}, key=len, reverse=True)
