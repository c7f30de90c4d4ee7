"""The log of jobs: numbered lines, stored on disk; the oldest are dropped."""

from __future__ import annotations

import contextlib
import json
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipelines.infra import manifest

MAX_LINES = 1_000
"""Number of lines that can be read again."""
MAX_CHARACTERS = 2_000
"""Longest text of a line."""


class EventLog:
    """A file of JSON lines, each with `id`, `time` (UTC) and `text`. Any thread may add to it and read it.

    If the disk is full, lines are kept in memory only; neither a job nor the start of a server fails.
    """

    def __init__(self, path: Path, max_lines: int = MAX_LINES):
        self.path, self.max_lines = path, max_lines
        self._lock = threading.Lock()
        self._lines = _read(path)[-max_lines:]
        with contextlib.suppress(OSError):
            self._rewrite()
        self.last = self._lines[-1]["id"] if self._lines else 0

    def add(self, text: str) -> None:
        """Add a line."""
        with self._lock:
            self.last += 1
            line = {
                "id": self.last,
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                "text": text[:MAX_CHARACTERS],
            }
            self._lines.append(line)
            with contextlib.suppress(OSError):
                if len(self._lines) >= 2 * self.max_lines:
                    self._lines = self._lines[-self.max_lines :]
                    self._rewrite()
                else:
                    with self.path.open("ab") as file:
                        file.write(_encode(line))

    def after(self, number: int) -> list[dict[str, Any]]:
        """Return the lines with a higher number, oldest first, at most the newest `max_lines`."""
        with self._lock:
            newest = self._lines[-self.max_lines :]
            return [line for line in newest if line["id"] > number]

    def _rewrite(self) -> None:
        manifest.write_bytes(self.path, b"".join(map(_encode, self._lines)))


def _encode(line: dict[str, Any]) -> bytes:
    return json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _read(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of the file; the last one may be incomplete."""
    lines = []
    for row in path.read_bytes().split(b"\n") if path.is_file() else []:
        try:
            line = json.loads(row)
        except ValueError:
            continue
        if isinstance(line, dict) and line.keys() == {"id", "time", "text"}:
            lines.append(line)
    return lines
