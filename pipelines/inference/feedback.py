"""Append to the feedback log: one row per feedback of a listener, and the recording if they consent.

Several threads and processes may append at the same time. infra/feedback_log.py reads the log.
"""

from __future__ import annotations

import io
import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pipelines.infra import feedback_log
from pipelines.infra.errors import LabError
from pipelines.infra.feedback_log import FLAGS
from pipelines.speech import text
from pipelines.speech.audio import SAMPLE_RATE_HZ, Waveform
from pipelines.speech.edits import count_edits

MAX_CHARS = 2_000
"""Longer texts are refused; thirty seconds of speech have about 500 characters."""

MAX_LOG_BYTES = 100_000_000
"""Size of the log above which no feedback is accepted: any visitor can add rows."""
MAX_RECORDINGS_BYTES = 2_000_000_000
"""Total size of the saved recordings above which no feedback with a recording is accepted: some 18 hours."""

_RECORDINGS = "audio"
_C1_CONTROLS = re.compile(r"[\x80-\x9f]+")


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """A listener's feedback on a transcript."""

    output: str
    """The transcript."""
    flag: str
    """`right` (the reference is the output) or `wrong`."""
    model: str
    """Name @ revision."""
    reference: str = ""
    """The listener's correction, or empty."""
    username: str = ""
    recording: Waveform | None = None
    """Is saved; ask for consent first."""


def append(log: Path, feedback: Feedback, now: datetime | None = None) -> dict[str, str]:
    """Append one feedback to the CSV file `log`, which is created if needed; return the row.

    `now` defaults to the current time. Raises LabError for a text over 2,000 characters, another flag, a log with other
    columns, a log that cannot be written, or one that is full (MAX_LOG_BYTES, MAX_RECORDINGS_BYTES).
    """
    if feedback.flag not in FLAGS:
        raise LabError(f"flag must be {' or '.join(FLAGS)}, got {feedback.flag!r}")
    output = clean_field("output", feedback.output)
    reference = output if feedback.flag == "right" else clean_field("reference", feedback.reference)
    row = {
        "audio": "",
        "output": output,
        "flag": feedback.flag,
        "username": clean_field("username", feedback.username),
        "timestamp": (now or datetime.now(UTC)).astimezone(UTC).isoformat(timespec="seconds"),
        "reference": reference,
        "wer": wer(reference, output),
        "model": clean_field("model", feedback.model),
    }
    csv_log = feedback_log.open_log(log)
    with csv_log.locked():
        _refuse_if_full(log, log.parent / _RECORDINGS if feedback.recording else None)
        row["audio"] = _save_recording(feedback.recording, log.parent / _RECORDINGS) if feedback.recording else ""
        try:
            csv_log.append(row)
        except (OSError, LabError):
            if row["audio"]:
                (log.parent / row["audio"]).unlink()
            raise
    return row


def _refuse_if_full(log: Path, recordings: Path | None) -> None:
    """Raise LabError if the log has its maximum size or, unless None, the folder of recordings has."""
    if log.is_file() and log.stat().st_size > MAX_LOG_BYTES:
        raise LabError(f"{log} is larger than {MAX_LOG_BYTES / 1e6:g} MB: move it away, or name another with --log")
    saved = recordings.glob("*.wav") if recordings else ()
    if sum(path.stat().st_size for path in saved) > MAX_RECORDINGS_BYTES:
        raise LabError(f"{recordings} holds more than {MAX_RECORDINGS_BYTES / 1e9:g} GB of recordings: move them away")


def wer(reference: str, output: str) -> str:
    """Return the normalised word error rate with four decimals, or "" if the reference contains no word."""
    if not text.normalise(reference):
        return ""
    edits = count_edits([reference], [output])
    return f"{edits.word_edits[0] / edits.words[0]:.4f}"


def clean_field(name: str, value: str) -> str:
    """Return NFC text in one line that is valid UTF-8. Raises LabError for more than MAX_CHARS."""
    if len(value) > MAX_CHARS:
        raise LabError(f"{name} has {len(value):,} characters, at most {MAX_CHARS:,} are allowed: shorten it")
    return text.clean(_C1_CONTROLS.sub(" ", value.encode("utf-8", "replace").decode()))


def _save_recording(recording: Waveform, folder: Path) -> str:
    """Write the recording under a random name and return its path relative to the log. Git ignores the folder."""
    import soundfile

    wav = io.BytesIO()
    soundfile.write(wav, recording.samples, SAMPLE_RATE_HZ, format="WAV", subtype="PCM_16")
    folder.mkdir(exist_ok=True)
    (folder / ".gitignore").write_text("*\n", encoding="utf-8")
    name = f"{secrets.token_hex(8)}.wav"
    (folder / name).write_bytes(wav.getvalue())
    return f"{folder.name}/{name}"
