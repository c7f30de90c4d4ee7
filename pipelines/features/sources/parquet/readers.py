"""Open one Parquet or Arrow file for several threads, and read columns of its row groups."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

from pipelines.infra import files
from pipelines.infra.errors import LabError, missing_package


class Reader(Protocol):
    """An open file."""

    where: str
    schema: Any
    groups: int

    def read(self, group: int, columns: list[str]) -> Any:
        """Read columns of a row group as a pyarrow Table; for `audio.path` at least that field of a struct."""

    def may_lack_bytes(self, group: int, column: str) -> bool:
        """Return False if every row of a group certainly has a value in `column`, a struct's field as `audio.bytes`."""


def open_reader(where: str, file: Any) -> Reader:
    """Open a file: a path or a file object, in Arrow format if the path ends in `.arrow`. Raises LabError."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise missing_package("pyarrow", "pyarrow>=18", "reading Parquet") from None
    if isinstance(file, str) and files.is_lfs_pointer(file):
        raise LabError(f"{where} is {files.LFS_ADVICE}")
    reader = ArrowReader(where, file) if where.endswith(".arrow") else ParquetReader(where, file)
    names = reader.schema.names
    if twice := next((name for name in names if names.count(name) > 1), ""):
        raise LabError(f"{where} has two columns {twice!r}: rename or remove one")
    return reader


class ParquetReader:
    """A Parquet file; pyarrow's reader serves one thread at a time."""

    def __init__(self, where: str, file: Any):
        import pyarrow.parquet as parquet

        self.where, self._path, self._lock = where, file if isinstance(file, str) else "", threading.Lock()
        # pre_buffer combines reads of neighbouring columns: each request over a network takes time
        self._file = self._read(lambda: parquet.ParquetFile(file, pre_buffer=True, page_checksum_verification=True))
        self.schema, self.groups = self._file.schema_arrow, self._file.num_row_groups

    def read(self, group: int, columns: list[str]) -> Any:
        with self._lock:
            return self._read(lambda: _validated(self._file.read_row_group(group, columns=columns)))

    def may_lack_bytes(self, group: int, column: str) -> bool:
        row_group = self._file.metadata.row_group(group)
        chunks = (row_group.column(number) for number in range(row_group.num_columns))
        statistics = [chunk.statistics for chunk in chunks if chunk.path_in_schema == column]
        return not all(one and one.has_null_count and one.null_count == 0 for one in statistics)

    def _read(self, action: Callable[[], Any]) -> Any:
        return _without_damage(self.where, self._path, action)


class ArrowReader:
    """An Arrow file as `save_to_disk` of the library datasets writes it, mapped into memory; its batches are groups."""

    def __init__(self, where: str, path: str):
        self.where, self._path = where, path
        self._batches = _without_damage(where, path, lambda: _arrow_batches(path))
        self.schema, self.groups = self._batches.schema, len(self._batches.batches)

    def read(self, group: int, columns: list[str]) -> Any:
        import pyarrow

        names = [name if name in self.schema.names else name.partition(".")[0] for name in columns]
        table = pyarrow.Table.from_batches([self._batches.batches[group]]).select(names)
        return _without_damage(self.where, self._path, lambda: _validated(table))

    def may_lack_bytes(self, group: int, column: str) -> bool:
        name, _, field = column.partition(".")
        values = self._batches.batches[group].column(name)
        return bool((values.field(field) if field else values).null_count)


class _ArrowBatches:
    def __init__(self, reader: Any, batches: list[Any]):
        self.schema, self.batches = reader.schema, batches


def _arrow_batches(path: str) -> _ArrowBatches:
    """Map a file in the streaming format, else in the file format; nothing is copied."""
    import pyarrow

    source = pyarrow.memory_map(path)
    try:
        reader = pyarrow.ipc.open_stream(source)
        return _ArrowBatches(reader, list(reader))
    except pyarrow.ArrowInvalid:
        reader = pyarrow.ipc.open_file(pyarrow.memory_map(path))
        return _ArrowBatches(reader, [reader.get_batch(number) for number in range(reader.num_record_batches)])


def _validated(table: Any) -> Any:
    """Return the table. Raises ArrowInvalid if a text is not UTF-8 or an offset lies outside its column."""
    table.validate(full=True)
    return table


def _without_damage(where: str, path: str, action: Callable[[], Any]) -> Any:
    """Return the result of `action`. Raises LabError for a damaged file, Unavailable if it cannot be read now."""
    import pyarrow

    try:
        return action()
    except (pyarrow.ArrowException, OSError, EOFError) as error:
        if path:
            files.check_readable(path)
        cause = str(error).partition("\n")[0][:200].rstrip(".")
        kind = "Arrow" if where.endswith(".arrow") else "Parquet"
        raise LabError(f"{where} must be a whole {kind} file, got: {cause}. Replace it") from None
