"""The windows of a recording that a journal stores, and what damage costs."""

import json

import numpy as np
import pytest
import soundfile

from pipelines.features.sources import journal as journals
from pipelines.speech.recordings.segmentation import Window


@pytest.fixture
def decode(tmp_path):
    """`decode()`: the texts of a recording of three windows, and the starts of those that were decoded now."""
    soundfile.write(tmp_path / "talk.wav", np.full(48_000, 0.1, np.float32), 16_000)

    def run():
        decoded = []

        def cut(blocks):
            samples = np.concatenate([*blocks])
            return [Window(samples[start * 16_000 :][:16_000], float(start), ()) for start in range(3)]

        def decode_windows(windows):
            for window in windows:
                decoded.append(window.start_s)
                yield {"start_s": window.start_s, "text": f"before\u2028after {window.start_s:g}"}

        records, end = journals.decode(tmp_path / "talk.wav", tmp_path / "talk.jsonl", cut, decode_windows)
        assert end["duration_s"] == 3
        return [one["text"] for one in records], decoded

    return run


def test_stored_windows_may_hold_any_line_break_of_unicode(decode):
    texts, decoded = decode()
    assert decoded == [0, 1, 2] and texts[0] == "before\u2028after 0"
    assert decode() == (texts, [])


@pytest.mark.parametrize("damage", [b"\0" * 30 + b"\n", b"\xff\n", b"[1]\n", b"{}\n", b'{"start_s": 1, "te'])
def test_damaged_line_costs_only_the_windows_from_it_on(decode, tmp_path, damage):
    texts, _ = decode()
    journal = tmp_path / "talk.jsonl"
    rows = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(rows[0] + damage + b"".join(rows[2:] if damage.endswith(b"\n") else []))
    assert decode() == (texts, [1, 2])
    assert decode() == (texts, [])
    assert all("text" in json.loads(row) for row in journal.read_bytes().splitlines()[:3])


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("", 0),
        ('{"start_s": 0.0, "end_s": 5.5}\n', 5.5),
        ('{"start_s": 0.0, "end_s": 5.5}\n{"start_s": 6.0, "end', 5.5),
        ('{"start_s": 0.0, "end_s": 5.5}\n{"end": {"duration_s": 9.0}}\n', 0),
    ],
)
def test_progress_is_the_end_of_the_last_whole_record(tmp_path, rows, expected):
    (tmp_path / "talk.jsonl").write_text(rows, "utf-8")
    assert journals.decoded_s(tmp_path / "talk.jsonl") == expected
    assert journals.decoded_s(tmp_path / "none.jsonl") == 0
