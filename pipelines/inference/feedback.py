"""Writing the feedback log: one row for each verdict of a listener, and the recording beside it where they consent.

Several threads and processes may append at once. Reading them is in infra/feedback_log.py.
"""

from __future__ import annotations

import io
import logging
import re
import secrets
from datetime import UTC, datetime
from pathlib import Path

from pipelines.infra import feedback_log
from pipelines.infra.errors import LabError
from pipelines.infra.feedback_log import FLAGS
from pipelines.speech import text
from pipelines.speech.audio import SAMPLE_RATE_HZ, Waveform
from pipelines.speech.edits import count_edits

MAX_CHARS = 2_000
"""Longer texts are refused: thirty seconds of speech hold some 500 characters."""

_C1_CONTROLS = re.compile(r"[\x80-\x9f]+")

_LOG = logging.getLogger(__name__)


def append(
    log: Path,
    *,
    output: str,
    flag: str,
    model: str,
    reference: str = "",
    username: str = "",
    recording: Waveform | None = None,
    now: datetime | None = None,
) -> dict[str, str]:
    """Add one verdict to the CSV file `log`, made with its header where it does not exist yet; returns the row.

    `flag` is `right` (the reference is then the output itself) or `wrong` (`reference` is the listener's correction,
    or empty). `model` is name @ revision. `recording` is kept only if it is given: ask before. `now` is the clock's
    time unless told.
    Raises LabError for a text over 2,000 characters, another flag, a log with other columns or one that
    cannot be written.
    """
    if flag not in FLAGS:
        raise LabError(f"flag must be {' or '.join(FLAGS)}, got {flag!r}")
    output, username, model = (
        clean_field("output", output),
        clean_field("username", username),
        clean_field("model", model),
    )
    reference = output if flag == "right" else clean_field("reference", reference)
    row = {
        "audio": "",
        "output": output,
        "flag": flag,
        "username": username,
        "timestamp": (now or datetime.now(UTC)).astimezone(UTC).isoformat(timespec="seconds"),
        "reference": reference,
        "wer": wer(reference, output),
        "model": model,
    }
    csv_log = feedback_log.open_log(log)
    with csv_log.locked():
        row["audio"] = _keep(recording, log.parent / "audio") if recording else ""
        try:
            csv_log.append(row)
        except (OSError, LabError):
            if row["audio"]:
                (log.parent / row["audio"]).unlink()
            raise
    return row


def wer(reference: str, output: str) -> str:
    """Normalised word error rate with four decimals; empty where the reference holds no word."""
    if not text.normalise(reference):
        return ""
    edits = count_edits([reference], [output])
    return f"{edits.word_edits[0] / edits.words[0]:.4f}"


def clean_field(name: str, value: str) -> str:
    """One line of NFC text that UTF-8 can hold. Raises LabError for more than MAX_CHARS."""
    if len(value) > MAX_CHARS:
        raise LabError(f"{name} has {len(value):,} characters, at most {MAX_CHARS:,} are kept: shorten it")
    return text.clean(_C1_CONTROLS.sub(" ", value.encode("utf-8", "replace").decode()))


def _keep(recording: Waveform, folder: Path) -> str:
    """Write the recording under a random name; the name as seen from the log. Git never takes the folder in."""
    import soundfile

    wav = io.BytesIO()
    soundfile.write(wav, recording.samples, SAMPLE_RATE_HZ, format="WAV", subtype="PCM_16")
    folder.mkdir(exist_ok=True)
    (folder / ".gitignore").write_text("*\n", encoding="utf-8")
    name = f"{secrets.token_hex(8)}.wav"
    (folder / name).write_bytes(wav.getvalue())
    return f"{folder.name}/{name}"
