"""The queue for the model, time limits and memory."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from pipelines.inference.app import service as app_service
from pipelines.inference.app.handlers import Handlers
from pipelines.inference.app.i18n import ENGLISH, SWEDISH
from pipelines.inference.app.service import Service
from pipelines.inference.transcript import Transcript
from tests.inference.app.app_fakes import (
    FakeTranscriber,
    create_chunk,
    expect_refusal,
    send_chunk,
)

gr = pytest.importorskip("gradio")
ROOT = Path(__file__).resolve().parents[3]
REFUSALS = ENGLISH["refused"]


def test_waiting_too_long_is_busy_and_can_be_repeated(handlers, spoken, monkeypatch, tmp_path):
    monkeypatch.setattr(app_service, "MAX_WAIT_S", 0.05)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))  # as an upload
    with handlers.service.turn():
        waiting = threading.Thread(
            target=lambda: refusals.append(expect_refusal(handlers.transcribe, spoken, None, "sv"))
        )
        refusals = []
        waiting.start()
        waiting.join(10)
    assert refusals == [SWEDISH["refused"]["busy"]]
    assert handlers.transcribe(spoken, None, "en")[0] == "Hej på dig."


def test_slow_recording_is_refused_and_next_one_works(handlers, spoken, monkeypatch):
    monkeypatch.setattr(app_service, "TIMEOUT_S", -1.0)
    assert expect_refusal(handlers.transcribe, spoken, None, "en") == REFUSALS["too_slow"]
    monkeypatch.setattr(app_service, "TIMEOUT_S", 60.0)
    assert handlers.transcribe(spoken, None, "en")[0] == "Hej på dig."


class BatchedTranscriber(FakeTranscriber):
    """Decodes a recording in three batches and calls on_audio before each, as Transcriber does."""

    def transcribe(self, recording, on_audio, on_segment):
        for n in range(3):
            on_audio(float(n))
            self.log.append(f"batch {n}")
            self.reached.set()
            assert self.go_on.wait(10)
        return Transcript(self.text, recording.duration_s, 0.1)


def test_live_chunk_is_decoded_between_two_batches(tmp_path, spoken, speech):
    fake = BatchedTranscriber(tmp_path)
    fake.log, fake.reached, fake.go_on = [], threading.Event(), threading.Event()
    handlers = Handlers(Service(fake, tmp_path / "log.csv"))
    recording = threading.Thread(target=lambda: handlers.transcribe(spoken, None, "en"))
    talking = threading.Thread(
        target=lambda: (send_chunk(handlers, create_chunk(speech(8_000))), fake.log.append("chunk"))
    )
    recording.start()
    assert fake.reached.wait(10)
    talking.start()
    while len(handlers.service.queue) < 2:
        time.sleep(0.01)
    fake.go_on.set()
    talking.join(10)
    recording.join(10)
    assert fake.log == ["batch 0", "chunk", "batch 1", "batch 2"]


def test_recording_is_too_slow_if_its_turn_does_not_return(tmp_path, spoken, monkeypatch):
    fake = BatchedTranscriber(tmp_path)
    fake.log, fake.reached, fake.go_on, refusals = [], threading.Event(), threading.Event(), []
    handlers = Handlers(Service(fake, tmp_path / "log.csv"))
    monkeypatch.setattr(app_service, "TIMEOUT_S", 1.0)
    recording = threading.Thread(
        target=lambda: refusals.append(expect_refusal(handlers.transcribe, spoken, None, "en"))
    )
    recording.start()
    assert fake.reached.wait(10)
    threading.Timer(0.1, fake.go_on.set).start()
    with handlers.service.turn():
        recording.join(10)
    assert refusals == [REFUSALS["too_slow"]]
    assert handlers.service.queue._tickets == app_service.deque(), "no ticket remains"


def test_queue_is_first_in_first_out():
    line, order = app_service.TurnQueue(), []

    def wait(name):
        ticket = line.enter(10)
        order.append(name)
        line.leave(ticket)

    first, threads = line.enter(1), []
    for n in range(5):
        threads.append(threading.Thread(target=wait, args=(n,)))
        threads[-1].start()
        while len(line) < n + 2:
            time.sleep(0.001)
    assert line.enter(0.01) is None
    line.leave(first)
    for thread in threads:
        thread.join(10)
    assert order == [0, 1, 2, 3, 4]


READ_SCRIPT = """
import resource, sys
from types import SimpleNamespace
from pipelines.inference.app.service import Service
service = Service(SimpleNamespace(), None)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    service.transcribe(sys.argv[1])
except Exception as error:
    print(error.reason, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
def test_highly_compressed_file_uses_little_memory(tmp_path):
    """Read half a minute of eight channels at 384 kHz: 380 MB as floats, half a megabyte as silence in FLAC."""
    soundfile = pytest.importorskip("soundfile")
    path = tmp_path / "bomb.flac"
    with soundfile.SoundFile(path, "w", 384_000, 8, "PCM_16", format="FLAC") as file:
        for _ in range(32):
            file.write(np.zeros((384_000, 8), np.int16))
    assert path.stat().st_size < 1_000_000
    done = subprocess.run(
        [sys.executable, "-c", READ_SCRIPT, path], cwd=ROOT, capture_output=True, text=True, check=True
    )
    reason, grown_mb = done.stdout.split()
    assert reason == "silent", "it was read to the end"
    assert int(grown_mb) < 200
