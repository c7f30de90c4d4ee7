"""Write the transcripts of an evaluation as a feedback log: `evaluate --log`, which produced log_base.csv."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from pipelines.experiments.evaluation import EvalReport
from pipelines.inference.feedback import clean_field, wer
from pipelines.infra import feedback_log, manifest
from pipelines.infra.errors import LabError


def write(log: Path, report: EvalReport, now: datetime | None = None) -> None:
    """Write the transcripts of a report to `log`, judged against the references instead of by a listener.

    `audio` is the clip's id in its source; `flag` is `right` if no word differs. An existing file is replaced. Raise
    LabError if it holds judgements of listeners.
    """
    refuse_listeners(log)
    timestamp = (now or datetime.now(UTC)).astimezone(UTC).isoformat(timespec="seconds")
    csv_log = feedback_log.open_log(log)
    lines = [csv_log.header_line()]
    for utterance in report.predictions.itertuples():
        error = wer(utterance.reference, utterance.hypothesis)
        row = {
            "audio": utterance.id,
            "output": clean_field("output", utterance.hypothesis),
            "flag": "right" if float(error or 1) == 0 else "wrong",
            "username": "",
            "timestamp": timestamp,
            "reference": utterance.reference,
            "wer": error,
            "model": report.model,
        }
        lines.append(csv_log.line(row))
    manifest.write_bytes(log, b"".join(lines))


def refuse_listeners(log: Path) -> None:
    """Raise LabError if `log` exists and was not written by `write`, or if its folder is missing."""
    if log.is_file() and any(
        row["username"] or row["audio"].startswith("audio/") or not row["audio"] for row in feedback_log.read(log)
    ):
        raise LabError(f"{log} holds judgements of listeners and is not replaced: name another file")
    if not log.absolute().parent.is_dir():
        raise LabError(f"there is no folder {log.parent} to write {log.name} into: create it, or name another file")
