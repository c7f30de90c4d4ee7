"""What listeners said in the app, as training examples: the loop from the app back to the data.

A verdict `right` gives the transcript that was judged, a correction gives the correction. Every row of the log becomes
an Example: one without a recording, or `wrong` without a correction, is rejected by curation under `missing` or
`no_text`, so that it is counted. All are training rows: who corrects is no sample of who speaks, so they judge nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pipelines.features.sources import SPLITS, Example
from pipelines.infra import feedback_log
from pipelines.infra.errors import LabError
from pipelines.infra.manifest import sha256

NOT_KEPT = "no-recording-was-kept"
"""The name under which the recording of a row without one is looked for in vain."""
META = ("flag", "timestamp", "model")


@dataclass(frozen=True)
class FeedbackSource:
    """The corpus in the feedback log `path`, with the recordings beside it."""

    path: str

    def identity(self) -> dict[str, str]:
        """A digest of the rows as they were understood, and one of the recordings."""
        rows = (json.dumps([row.id, row.text, row.speaker, row.meta]) for row in self._all)
        files = (sha256(row.audio) if os.path.isfile(row.audio) else "absent" for row in self._all)
        return {"kind": "feedback", "rows_sha256": _digest(rows), "files_sha256": _digest(files)}

    def examples(self, splits: tuple[str, ...] = SPLITS) -> Iterator[Example]:
        """The rows, oldest first, if `train` is asked for. Raises LabError at once for a log that cannot be used."""
        return iter(self._all if "train" in splits else ())

    def outline(self) -> Iterator[Example]:
        """All rows; their audio is a path, and no file is opened."""
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
        name = f"{number:05d}-{audio.stem}"  # a number of its own: one recording may be judged twice
        text = row["output"] if row["flag"] == "right" else row["reference"]
        speaker = row["username"] or f"anonymous-{name}"
        return Example(name, "train", text, audio, speaker, {column: row[column] for column in META if row[column]})

    def _recording(self, cell: str) -> Path:
        """Where a row's recording lies: beside the log, wherever a cell of the log may point."""
        folder = self._log.parent
        file = folder / cell if cell and "\0" not in cell else folder / NOT_KEPT
        try:
            stays = file.resolve().is_relative_to(folder.resolve())
        except (OSError, RuntimeError):  # links in a circle lead nowhere
            stays = False
        return file if stays else folder / NOT_KEPT


def _digest(lines: Iterator[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
