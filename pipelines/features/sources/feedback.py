"""Feedback from the app as training examples: the loop from the app back to the data.

The transcript of an example is the judged transcript for the verdict `right`, else the correction. Every row of the log
becomes an Example: curation rejects and counts one without a recording (`missing`) or `wrong` without a correction
(`no_text`). All are training rows: people who give feedback are not a random sample of speakers to evaluate with.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pipelines.features.sources import SPLITS, Example, lines_sha256
from pipelines.infra import feedback_log, files
from pipelines.infra.errors import LabError
from pipelines.infra.file_lookup import is_inside
from pipelines.infra.manifest import sha256

MISSING = "no-recording-was-kept"
"""File name, which does not exist, of a row without a recording."""
META = ("flag", "timestamp", "model")


@dataclass(frozen=True)
class FeedbackSource:
    """The corpus of the feedback log `path`, with the recordings beside it."""

    path: str

    def identity(self) -> dict[str, str]:
        """Return a digest of the rows, and one of the recordings."""
        rows = (json.dumps([row.id, row.text, row.speaker, row.meta]) for row in self._all)
        recordings = (_sha256(row.audio) for row in self._all)
        return {"kind": "feedback", "rows_sha256": lines_sha256(rows), "files_sha256": lines_sha256(recordings)}

    def examples(self, splits: tuple[str, ...] = SPLITS) -> Iterator[Example]:
        """Return the rows, oldest first, if `splits` include train. Raises LabError at once for an unusable log."""
        return iter(self._all if "train" in splits else ())

    def outline(self) -> Iterator[Example]:
        """Return all rows; their audio is a path, and no file is opened."""
        return self.examples()

    @property
    def _log(self) -> Path:
        return Path(self.path).expanduser()

    @cached_property
    def _all(self) -> list[Example]:
        if not self._log.is_file():
            raise LabError(
                f"source.path must name the app's feedback log, got {self.path!r}, which is no file: "
                "collect some feedback first (python app.py --log ...)"
            )
        rows = feedback_log.read(self._log)
        if not rows:
            raise LabError(f"{self.path} holds no verdict yet: collect some feedback in the app first")
        return [self._example(number, row) for number, row in enumerate(rows)]

    def _example(self, number: int, row: dict[str, str]) -> Example:
        audio = self._recording(row["audio"])
        name = f"{number:05d}-{audio.stem}"  # numbered, because a recording may be judged twice
        text = row["output"] if row["flag"] == "right" else row["reference"]
        speaker = row["username"] or f"anonymous-{name}"
        return Example(name, "train", text, audio, speaker, {column: row[column] for column in META if row[column]})

    def _recording(self, cell: str) -> Path:
        """Return the path of a row's recording; a cell that leads out of the log's folder counts as missing."""
        folder = self._log.parent
        file = folder / cell if cell and "\0" not in cell else folder / MISSING
        return file if is_inside(file, folder) else folder / MISSING


def _sha256(path: Path) -> str:
    """Return the sha256 of a recording, or `absent`. Raises Unavailable if it cannot be read at the moment."""
    return files.retry(lambda: sha256(path), path) if files.is_file(path) else "absent"
