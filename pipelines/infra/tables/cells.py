"""Cells without a value, and columns that have the same name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipelines.infra.errors import LabError

MISSING_WORDS = frozenset(
    "#N/A,#NA,#NULL!,<NA>,N/A,NA,NULL,NaN,None,n/a,nan,null,-NaN,-nan,1.#QNAN,-1.#IND,NaT".split(",")
)
"""Words that pandas, R, SQL and Excel write for a missing value. `Na` and `Nan` are none of them: they may be text."""
Cells = dict[str, Any]
"""Column name to value in one row: str, from JSON and .xlsx also a number; None if there is no value."""


def is_missing(value: Any) -> bool:
    """Return whether a cell of metadata holds no value: None, NaN, blanks or one of MISSING_WORDS."""
    return value is None or value != value or (isinstance(value, str) and value.strip() in {"", *MISSING_WORDS})


def check_unique(where: str, columns: Sequence[str]) -> None:
    """Raise LabError, naming both, if two columns with a name differ at most in case."""
    first: dict[str, int] = {}
    for number, name in enumerate(columns, 1):
        other = first.setdefault(name.lower(), number) if name else number
        if other != number:
            raise LabError(
                f"{where}: each column must have its own name, got {columns[other - 1]!r} as column {other} and "
                f"{name!r} as column {number}: rename or remove one"
            )
