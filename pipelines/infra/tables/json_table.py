"""Tables with one JSON object for each row."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from pipelines.infra.errors import LabError
from pipelines.infra.tables.cells import Cells, check_unique
from pipelines.infra.tables.encoding import detect_encoding, readable


class JsonTable:
    """A file with one JSON object on each line; a .json file may also be a list of objects."""

    def __init__(self, path: Path):
        self.path = path

    @cached_property
    def columns(self) -> list[str]:
        """The keys of all rows, in the order of their first use."""
        return list(dict.fromkeys(key for _, cells in self.rows() for key in cells))

    def rows(self) -> Iterator[tuple[str, Cells]]:
        """Yield the position of each row, for errors, and its keys and values. A row may lack keys of other rows."""
        for where, row in self._parsed():
            if not isinstance(row, _Pairs):
                raise LabError(f"{where}: a line must be one JSON object, got {str(row)[:60]!r}: correct it")
            check_unique(where, [key.strip() for key, _ in row])
            yield where, {key.strip(): dict(value) if isinstance(value, _Pairs) else value for key, value in row}

    def _parsed(self) -> Iterator[tuple[str, Any]]:
        with readable(self.path), open(self.path, encoding=detect_encoding(self.path), newline="\n") as file:
            if self.path.suffix.lower() == ".json" and file.read(64).lstrip().startswith("["):
                file.seek(0)
                whole = _parse(file.read().lstrip("\ufeff"))
                rows = whole if isinstance(whole, list) else [whole]
                yield from ((f"{self.path.name} row {number}", row) for number, row in enumerate(rows, 1))
                return
            file.seek(0)
            for number, line in enumerate(file, 1):
                if line.strip("\ufeff \t\r\n\0"):
                    yield f"{self.path.name} line {number}", _parse(line.lstrip("\ufeff").replace("\0", ""))


class _Pairs(tuple):
    """The keys and values of a JSON object, in which a key may occur twice."""


def _parse(content: str) -> Any:
    """Return JSON as Python values, objects as _Pairs, NaN as None; the content itself if it is not JSON."""
    try:
        return json.loads(content, object_pairs_hook=_Pairs, parse_constant=lambda name: None)
    except (ValueError, RecursionError):
        return content
