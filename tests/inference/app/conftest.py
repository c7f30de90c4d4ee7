"""Fixtures of the app: event handlers around a fake transcriber, and a recording."""

import pytest

from pipelines.inference.app.handlers import Handlers
from pipelines.inference.app.service import Service
from pipelines.speech.recordings import detection
from tests.inference.app.app_fakes import (
    FakeTranscriber,
)

gr = pytest.importorskip("gradio")


@pytest.fixture
def handlers(tmp_path):
    return Handlers(Service(FakeTranscriber(tmp_path / "runs" / "train-1" / "model"), tmp_path / "log.csv"))


@pytest.fixture
def spoken(tmp_path, encoded, speech):
    path = tmp_path / "spoken.wav"
    path.write_bytes(encoded(speech(33_600)))
    return str(path)


@pytest.fixture
def warnings(monkeypatch):
    messages = []
    monkeypatch.setattr(gr, "Warning", lambda message, **more: messages.append(message))
    return messages


@pytest.fixture
def all_is_speech(monkeypatch):
    monkeypatch.setattr(detection, "is_packaged", lambda: False)
