"""Parts of long recordings: read in order, by several threads, and after a read that failed."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pipelines.infra.files import Unavailable
from pipelines.speech.audio import SAMPLE_RATE_HZ
from pipelines.speech.recordings import pieces

SECONDS = 60
SAMPLES = np.arange(SECONDS * SAMPLE_RATE_HZ, dtype=np.float32)


@pytest.fixture
def recording(monkeypatch):
    """A recording in blocks of a second; the first reader fails at second `faults[0]`."""
    faults = []

    def blocks(path):
        for second in range(SECONDS):
            if faults and second == faults[0]:
                faults.clear()
                raise Unavailable("the disk is away")
            time.sleep(0.0002)  # other threads run meanwhile
            yield SAMPLES[second * SAMPLE_RATE_HZ : (second + 1) * SAMPLE_RATE_HZ]

    monkeypatch.setattr(pieces.audio, "blocks", blocks)
    monkeypatch.setattr(pieces, "_open", {})
    return faults


def test_piece_after_a_failed_read_is_complete(recording):
    recording.append(10)
    with pytest.raises(Unavailable):
        pieces.read_piece(Path("a.mp3"), 8, 12)
    assert np.array_equal(pieces.read_piece(Path("a.mp3"), 8, 12), SAMPLES[8 * SAMPLE_RATE_HZ : 12 * SAMPLE_RATE_HZ])


def test_several_threads_read_their_own_pieces(recording):
    starts = [*range(2, SECONDS - 2, 4)]
    with ThreadPoolExecutor(4) as threads:
        read = [*threads.map(lambda start: pieces.read_piece(Path("a.mp3"), start, start + 2), starts)]
    for start, samples in zip(starts, read, strict=True):
        assert np.array_equal(samples, SAMPLES[start * SAMPLE_RATE_HZ : (start + 2) * SAMPLE_RATE_HZ])
