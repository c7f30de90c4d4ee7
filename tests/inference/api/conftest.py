"""A toy transcriber and a recording for the tests of the API."""

import dataclasses

import pytest

from pipelines.inference.transcriber import Transcriber
from pipelines.speech.recordings import detection
from pipelines.whisper import model as whisper_model
from tests.inference.api.running_server import SCORE


@pytest.fixture(scope="module")
def toy(toy_model):
    facts = {"made": "2026-11-20T09:30:00+00:00", "test": SCORE, "base": "openai/whisper-tiny @ 7ebd0e69e781"}
    ref = dataclasses.replace(whisper_model.resolve(str(toy_model)), context="clip", facts=facts)
    return Transcriber(ref, engine="transformers", device="cpu", threads=1, max_new_tokens=8)


@pytest.fixture(scope="module", autouse=True)
def all_sound_is_speech():
    """The recordings of these tests are noise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detection, "open_detector", detection.AnySound)
        yield


@pytest.fixture(scope="module")
def wav(encoded, speech) -> bytes:
    return encoded(speech(2 * 16_000))
