"""Append-only CSV logs that several threads and processes write at once.

Each row is one write, flushed to the disk, under a file lock. A crash can cut only the last line: the next append
removes it, or ends it where its row is complete.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipelines.infra.errors import LabError
from pipelines.infra.tables.formulas import decode_cell, encode_cell

logger = logging.getLogger(__name__)

LOCK_TIMEOUT_S = 10.0
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class CsvLog:
    """One log file. Spreadsheet exports with a byte order mark or CRLF line ends are read, too.

    Cells that a spreadsheet would run as a formula are stored as text.
    """

    path: Path
    columns: tuple[str, ...]
    remedy: str = "free space or make it writable"
    """What to do when the file cannot be written: the end of the error message."""
    foreign_remedy: str = "move it away, a new one is written"
    """What to do when the file has other columns."""
    is_complete: Callable[[dict[str, str]], bool] = lambda row: True
    """Whether a row without a line end was written completely: a cut last cell still parses."""
    lock_timeout_s: float = LOCK_TIMEOUT_S

    def read(self) -> list[dict[str, str]]:
        """Return the complete rows, oldest first; an empty list if there is no file.

        Raises LabError for a file with other columns.
        """
        content = self.path.read_bytes() if self.path.is_file() else b""
        if self._is_cut_header(content):
            return []
        header, *lines = content.split(b"\n")
        self.check_header(header)
        rows = [self.parse(line) for line in lines[:-1] if line.strip()]
        last = self._parse_unterminated(lines[-1]) if lines and lines[-1].strip() else None
        if None in rows:
            logger.warning(f"{self.path}: {rows.count(None)} incomplete rows were left out")
        return [row for row in [*rows, last] if row is not None]

    def check_header(self, header: bytes) -> None:
        """Raise LabError if the file's first line does not name the columns."""
        if header.removeprefix(_BOM).rstrip(b"\r") != self._header:
            received = header[:200].decode("utf-8", "replace").strip()
            expected = self._header.decode()
            raise LabError(f"{self.path} has the columns {received!r}, expected {expected!r}: {self.foreign_remedy}")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the log's lock. Raises LabError if it is not free in time or the disk refuses a write."""
        import filelock

        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(self.path.with_name(f".{self.path.name}.lock"), timeout=self.lock_timeout_s):
                yield
        except filelock.Timeout:
            raise LabError(
                f"{self.path} was locked by another process for {self.lock_timeout_s:g} s: try again"
            ) from None
        except OSError as error:
            raise LabError(f"{self.path} cannot be written ({error.strerror or error}): {self.remedy}") from None

    def append(self, row: Mapping[str, str]) -> None:
        """Append one row. Call it within `locked`."""
        has_header = self._repair()
        self._write((b"" if has_header else self.header_line()) + self.line(row))

    def header_line(self) -> bytes:
        """Return the file's first line, with its line end."""
        return self._header + b"\n"

    def line(self, row: Mapping[str, str]) -> bytes:
        """Return a row as a line of the file, with its line end."""
        return _csv_line(encode_cell(row[name]) for name in self.columns)

    def parse(self, line: bytes) -> dict[str, str] | None:
        """Return the row in a line, or None if the line is damaged."""
        try:
            cells = next(csv.reader([line.decode().rstrip("\r")], strict=True), [])
        except (csv.Error, UnicodeDecodeError):
            return None
        if len(cells) != len(self.columns):
            return None
        return {name: decode_cell(cell) for name, cell in zip(self.columns, cells, strict=True)}

    @property
    def _header(self) -> bytes:
        return ",".join(self.columns).encode()

    def _is_cut_header(self, content: bytes) -> bool:
        return b"\n" not in content and self._header.startswith(content) and content != self._header

    def _parse_unterminated(self, line: bytes) -> dict[str, str] | None:
        row = self.parse(line)
        return row if row is not None and self.is_complete(row) else None

    def _repair(self) -> bool:
        """End the file with a complete line; return False if it still needs its header."""
        content = self.path.read_bytes() if self.path.is_file() else b""
        if self._is_cut_header(content):
            if content:
                os.truncate(self.path, 0)
            return False
        self.check_header(content.partition(b"\n")[0])
        last = content[content.rfind(b"\n") + 1 :]
        if last and (last == self._header or self._parse_unterminated(last) is not None):
            self._write(b"\n")
        elif last:  # an open quote in it would swallow all later rows
            logger.warning(f"{self.path}: removed a last row that a crash cut short: {last!r}")
            os.truncate(self.path, len(content) - len(last))
        return True

    def _write(self, data: bytes) -> None:
        """Append in one write and flush to the disk; remove what was written if the disk is full."""
        with open(self.path, "ab", buffering=0) as file:
            size = file.tell()
            try:
                if file.write(data) != len(data):
                    raise OSError(errno.ENOSPC, "No space left on device")
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise


def _csv_line(cells: Iterator[str]) -> bytes:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow(cells)
    return out.getvalue().encode()
