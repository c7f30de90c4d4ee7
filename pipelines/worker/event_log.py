"""What jobs tell, line after line: numbered, kept on the disk, the oldest let go."""

from __future__ import annotations

import contextlib
import json
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipelines.infra import manifest

KEPT = 1_000
"""Lines that can be read again."""
LONGEST = 2_000
"""Characters of a line."""


class EventLog:
    """A file of JSON lines, each with `id`, `time` (UTC) and `text`. Any thread may add to it and read it.

    A disk that is full costs the copy on the disk, and neither a job nor the start of a server.
    """

    def __init__(self, path: Path, kept: int = KEPT):
        self.path, self.kept = path, kept
        self._lock = threading.Lock()
        self._lines = _read(path)[-kept:]
        with contextlib.suppress(OSError):
            self._rewrite()
        self.last = self._lines[-1]["id"] if self._lines else 0

    def add(self, text: str) -> None:
        """Add a line."""
        with self._lock:
            self.last += 1
            line = {"id": self.last, "time": datetime.now(UTC).isoformat(timespec="seconds"), "text": text[:LONGEST]}
            self._lines.append(line)
            with contextlib.suppress(OSError):
                if len(self._lines) >= 2 * self.kept:
                    self._lines = self._lines[-self.kept :]
                    self._rewrite()
                else:
                    with self.path.open("ab") as file:
                        file.write(_written(line))

    def after(self, number: int) -> list[dict[str, Any]]:
        """The lines with a higher number, oldest first, at most the newest `kept`."""
        with self._lock:
            newest = self._lines[-self.kept :]
            return [line for line in newest if line["id"] > number]

    def _rewrite(self) -> None:
        manifest.write_bytes(self.path, b"".join(map(_written, self._lines)))


def _written(line: dict[str, Any]) -> bytes:
    return json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _read(path: Path) -> list[dict[str, Any]]:
    """The whole lines of the file; the last one may have been cut off."""
    lines = []
    for row in path.read_bytes().split(b"\n") if path.is_file() else []:
        try:
            line = json.loads(row)
        except ValueError:
            continue
        if isinstance(line, dict) and line.keys() == {"id", "time", "text"}:
            lines.append(line)
    return lines
