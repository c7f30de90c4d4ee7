"""The texts are those of transformers' own pipeline with its default arguments."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toy_whisper import END, FIRST_TIMESTAMP, LAST_TIMESTAMP
from transformers import AutomaticSpeechRecognitionPipeline

from pipelines.features.sources.synthetic.tour import TourSource
from pipelines.infra.errors import LabError
from pipelines.speech import audio
from pipelines.speech.audio import SAMPLE_RATE_HZ, Waveform
from pipelines.whisper import decoding, log_mel
from pipelines.whisper import model as whisper_model
from pipelines.whisper.engines import stock_pipeline
from pipelines.whisper.model import ModelRef

pytestmark = pytest.mark.usefixtures("one_thread")
FULL_FRAMES = log_mel.FULL_FRAMES


@pytest.fixture(scope="module")
def toy(toy_model):
    return whisper_model.load(ModelRef("toy", toy_model, "folder", "0")).eval()


@pytest.fixture(scope="module")
def processor(toy_model):
    return whisper_model.load_processor(ModelRef("toy", toy_model, "folder", "0"), "sv")


@pytest.fixture(scope="module")
def sounds() -> list[np.ndarray]:
    """Noise of three lengths, the last one 30 s."""
    rng = np.random.default_rng(3)
    return [rng.normal(0, 0.1 * n, n * SAMPLE_RATE_HZ).astype(np.float32).clip(-1, 1) for n in (1, 4, 30)]


def features_of(sounds: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack([log_mel.extract(Waveform(x), 80).padded(FULL_FRAMES) for x in sounds]))


def in_pipeline(model, processor, sounds: list[np.ndarray]) -> list[str]:
    from transformers import pipeline

    parts = {"tokenizer": processor.tokenizer, "feature_extractor": processor.feature_extractor}
    recogniser = pipeline("automatic-speech-recognition", model=model, **parts)
    arguments = {"language": "sv", "task": "transcribe"}
    raw = [{"raw": sound, "sampling_rate": SAMPLE_RATE_HZ} for sound in sounds]
    return [recogniser(sound, generate_kwargs=arguments)["text"].strip() for sound in raw]


@pytest.mark.parametrize(
    ("settings", "is_searched_here"),
    [
        ({}, True),
        ({"num_beams": 3, "max_length": None}, True),
        ({"eos_token_id": "frequent"}, True),
        ({"suppress_tokens": []}, True),  # timestamps are written: the pipeline goes on from them
        ({"repetition_penalty": 1.5, "num_beams": 1}, False),
    ],
    ids=str,
)
def test_texts_equal_those_of_the_real_pipeline(toy, processor, sounds, monkeypatch, settings, is_searched_here):
    features, saved = features_of(sounds), toy.generation_config
    no_timestamps = [*saved.suppress_tokens, *range(FIRST_TIMESTAMP, LAST_TIMESTAMP + 1)]
    settings = {"max_length": 24, "suppress_tokens": no_timestamps, **settings}
    if "eos_token_id" in settings:  # the toy model knows no end: its texts end at tokens that it writes
        free = decoding.generate(toy, features, stock_pipeline.prompt_ids(processor, "sv"), 12).tolist()
        settings["eos_token_id"] = [END, free[0][3], free[1][6]]
    for name, value in settings.items():
        monkeypatch.setattr(saved, name, value, raising=False)
    monkeypatch.setattr(stock_pipeline, "MAX_NEW_TOKENS", 20)
    monkeypatch.setattr(AutomaticSpeechRecognitionPipeline._default_generation_config, "max_new_tokens", 20)
    assert stock_pipeline._is_usual(toy) == is_searched_here
    texts = stock_pipeline.decode(toy, processor, features, "sv")
    assert texts == in_pipeline(toy, processor, sounds)
    assert len(set(texts)) > 1, "texts depend on the audio"


def test_model_that_transformers_refuses_is_one_line(toy, processor, sounds, monkeypatch):
    monkeypatch.setattr(toy.generation_config, "lang_to_id", None)
    monkeypatch.setattr(toy.generation_config, "task_to_id", None)
    with pytest.raises(LabError, match=r"transformers' pipeline cannot decode .* evaluation.stock_pipeline=false"):
        stock_pipeline.decode(toy, processor, features_of(sounds[:1]), "sv")


@pytest.mark.slow
def test_real_weights_write_the_text_of_the_real_pipeline(tiny_folder):
    ref = whisper_model.resolve(str(tiny_folder))
    model, processor = whisper_model.load(ref), whisper_model.load_processor(ref, "sv")
    examples = [one for one in TourSource(train=2, validation=2, test=4).examples() if one.split == "test"]
    sounds = [audio.decode(example.audio).samples for example in examples]
    texts = stock_pipeline.decode(model, processor, features_of(sounds), "sv")
    assert texts == in_pipeline(model, processor, sounds)
    assert all(len(text) > 5 for text in texts)
