"""Read and write the two tables of a series, and refuse those that are damaged."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import filelock
import pandas as pd

from pipelines.infra import manifest
from pipelines.infra.errors import LabError
from pipelines.infra.tables.formulas import decode_cell, encode_cell

UTTERANCES, RUNS = "utterances.csv", "runs.csv"
_COLUMNS = {UTTERANCES: ("id", "speaker", "words"), RUNS: ("recipe", "seed", "test_set", "normaliser")}
_LOCK = ".tables.lock"
_EDITS = r"\d+ \d+ \d+"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one process at a time read the tables of a folder and replace them; the folder is made if necessary."""
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / _LOCK):
        yield


def read(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the tables of utterances and of runs in `folder`, all cells as text; empty ones if there are none.

    A column of a run that is not in runs.csv is left out: its process was killed between both tables. Raises LabError
    if one of several results is missing or damaged.
    """
    if folder.exists() and not folder.is_dir():
        raise LabError(f"the tables of a series need a folder, got the file {folder}: name another")
    if not (folder / RUNS).is_file():
        n = len(results(read_utterances(folder))) if (folder / UTTERANCES).is_file() else 0
        if n > 1:
            raise LabError(
                f"{folder} must hold {RUNS} beside {UTTERANCES}, which has {n} results, got none: restore it, or "
                f"remove {UTTERANCES} to start again"
            )
        return pd.DataFrame(), pd.DataFrame()
    costs, table = _read(folder / RUNS), read_utterances(folder)
    finished = {f"{recipe}/{seed}" for recipe, seed in zip(costs["recipe"], costs["seed"], strict=True)}
    return table.drop(columns=[name for name in results(table) if name not in finished]), costs


def read_utterances(folder: Path) -> pd.DataFrame:
    """Return the table of utterances, all cells as text. Raises LabError if it is missing or damaged."""
    path = folder / UTTERANCES
    table = _read(path)
    if (twice := table["id"][table["id"].duplicated()]).any():
        raise _damaged(path, "one row per utterance", f"two of {twice.iloc[0][:60]!r}")
    for name in results(table):
        if not (cells := table[name].str.fullmatch(_EDITS)).all():
            row = table[~cells].iloc[0]
            raise _damaged(
                path, "three numbers of edits", f"{row[name][:60]!r} in column {name}, id {row['id'][:60]!r}"
            )
    return table


def results(table: pd.DataFrame) -> list[str]:
    """Return the columns of a table of utterances that are results: `recipe/seed`."""
    return [name for name in table if "/" in name]


def write(folder: Path, table: pd.DataFrame, costs: pd.DataFrame) -> None:
    """Replace both tables, runs.csv last: a result counts once it stands there."""
    for name, content in ((UTTERANCES, table), (RUNS, costs)):
        manifest.write_bytes(folder / name, content.map(encode_cell).to_csv(index=False).encode())


def _read(path: Path) -> pd.DataFrame:
    columns = ", ".join(_COLUMNS[path.name])
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False).map(decode_cell)
    except (OSError, ValueError) as error:  # pandas' errors are ValueErrors
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise _damaged(path, f"the columns {columns}", reason) from None
    if {*_COLUMNS[path.name]} - {*table}:
        got = ", ".join(map(str, table))[:80]
        raise _damaged(path, f"the columns {columns}, separated by commas", repr(got))
    return table


def _damaged(path: Path, expected: str, received: str) -> LabError:
    return LabError(f"{path} must have {expected}, got {received}: restore it, or name another folder")
