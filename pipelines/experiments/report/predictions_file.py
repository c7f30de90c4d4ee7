"""Write and read predictions.csv, so that no spreadsheet runs a transcript as a formula."""

from __future__ import annotations

import csv
from pathlib import Path

import pandas as pd

from pipelines.experiments.report import slices
from pipelines.infra.tables.formulas import decode_cell, encode_cell

NAME = "predictions.csv"
_TEXTS = ("id", "speaker", "reference", "hypothesis", *slices.COLUMNS)


def write(folder: Path, predictions: pd.DataFrame) -> None:
    """Write the table to `folder`; an apostrophe before signs such as `=` makes a cell text for spreadsheets."""
    texts = {name: predictions[name].map(encode_cell) for name in _TEXTS if name in predictions}
    predictions.assign(**texts).to_csv(folder / NAME, index=False, quoting=csv.QUOTE_NONNUMERIC)


def read(folder: Path) -> pd.DataFrame:
    """Return the table in `folder` as it was written."""
    # read text columns as text: pandas would turn a transcript such as 007 into a number
    predictions = pd.read_csv(folder / NAME, keep_default_na=False, dtype=dict.fromkeys(_TEXTS, str))
    return predictions.assign(**{name: predictions[name].map(decode_cell) for name in _TEXTS if name in predictions})
