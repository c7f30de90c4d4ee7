"""The feedback log: corrections of transcripts that users of the app submit.

    <log>.csv           audio, output, flag, username, timestamp, reference, wer, model
    audio/<random>.wav  recordings that were stored with consent

The first five columns are those of Gradio's flag file. inference/feedback.py writes the log;
features/sources/feedback.py reads it as training examples.
"""

from __future__ import annotations

from pathlib import Path

from pipelines.infra.csv_log import CsvLog

COLUMNS = ("audio", "output", "flag", "username", "timestamp", "reference", "wer", "model")
FLAGS = ("right", "wrong")


def open_log(path: Path) -> CsvLog:
    """Return the feedback log at `path`."""
    return CsvLog(
        path, COLUMNS, remedy="free space or name another log", foreign_remedy="move it away or name another log"
    )


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows as passed to `inference.feedback.append`, oldest first; an empty list if there is no log.

    Raises LabError for a log with other columns.
    """
    return open_log(path).read()
