"""Known text scored against sound."""

import numpy as np

from pipelines.speech.audio import Waveform
from pipelines.whisper import model as whisper_model
from pipelines.whisper.engines import forced, open_engine


def test_last_line_is_scored_with_its_end(toy_model, monkeypatch):
    engine = open_engine(whisper_model.resolve(str(toy_model)), "sv", "transformers")
    log_mel = engine.log_mel(Waveform(np.random.default_rng(0).normal(0, 0.1, 32_000).astype(np.float32)))
    engine.model.proj_out.register_forward_hook(lambda module, inputs, logits: without(logits, engine.spelling.end))
    first, last = forced.force(engine, log_mel, ["Hej då.", "Kom nu."])
    assert first.lowest > -50
    assert last.lowest < -50


def test_first_word_is_spelled_as_the_model_writes_it(toy_model):
    """Models that were tuned on single clips put no space before it."""
    engine = open_engine(whisper_model.resolve(str(toy_model)), "sv", "transformers")
    log_mel = engine.log_mel(Waveform(np.random.default_rng(0).normal(0, 0.1, 32_000).astype(np.float32)))
    last = len(engine.spelling.prompt("sv")) - 1
    for starts_with_space in (True, False):
        first = engine.spelling.ids("Hej", starts_with_space)[0][0]
        hook = engine.model.proj_out.register_forward_hook(
            lambda module, inputs, logits, id=first: sure(logits, last, id)
        )
        assert forced.force(engine, log_mel, ["Hej då."])[0].lowest > -20
        hook.remove()


def sure(logits, position, token):
    """Make one token certain at a position."""
    logits = logits.clone()
    logits[:, position, token] += 50.0
    return logits


def without(logits, token):
    """Make one token impossible."""
    logits = logits.clone()
    logits[..., token] = -100.0
    return logits
