from __future__ import annotations

import pytest
import torch
from toy_whisper import END

from pipelines.whisper import decoding, greedy
from pipelines.whisper import model as whisper_model
from pipelines.whisper.batching import Collator
from pipelines.whisper.decoding import RowDecodingOptions
from pipelines.whisper.model import ModelRef

pytestmark = pytest.mark.usefixtures("one_thread")
LIMIT = 24


@pytest.fixture(scope="module")
def toy(toy_model):
    return whisper_model.load(ModelRef("toy", toy_model, "folder", "0"))


@pytest.fixture(scope="module")
def processor(toy_model):
    return whisper_model.load_processor(ModelRef("toy", toy_model, "folder", "0"), "sv")


@pytest.fixture(scope="module")
def features(toy_cache) -> torch.Tensor:
    return Collator(toy_cache)(toy_cache.split("test").tolist())["input_features"]


@pytest.fixture
def ends(toy, processor, features):
    """Let the texts of the toy model, which knows no end, end at tokens that it writes at different steps."""
    free = decoding.decode(toy, processor, features, RowDecodingOptions("sv", LIMIT, word_logprobs=True))
    assert {one.tokens for one in free} == {LIMIT}
    tokens = decoding.generate(toy, features, decoding.prompt_ids(processor, "sv"), LIMIT)
    some = {int(tokens[row, 4 + 2 * row]) for row in range(8)}
    saved, toy.generation_config.eos_token_id = toy.generation_config.eos_token_id, [END, *some]
    yield
    toy.generation_config.eos_token_id = saved


@pytest.mark.usefixtures("ends")
def test_hypotheses_equal_those_of_transformers_generate(toy, processor, features, monkeypatch):
    options, cut = RowDecodingOptions("sv", LIMIT, word_logprobs=True), []
    ours = decoding.decode(toy, processor, features, options)
    texts = decoding.decode_to_text(toy, processor, features, RowDecodingOptions("sv", LIMIT, on_cut=cut.append))
    monkeypatch.setattr(greedy, "runs_on", lambda model: False)
    expected = decoding.decode(toy, processor, features, options)
    decoding.decode_to_text(toy, processor, features, RowDecodingOptions("sv", LIMIT, on_cut=cut.append))
    assert texts == [one.text for one in ours] == [one.text for one in expected]
    assert [one.tokens for one in ours] == [one.tokens for one in expected]
    assert len({one.tokens for one in ours}) > 2, "texts end at different steps"
    for one, other in zip(ours, expected, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
        assert one.no_speech == pytest.approx(other.no_speech, rel=1e-4)
        assert [word for word, _ in one.words] == [word for word, _ in other.words]
        assert [p for _, p in one.words] == pytest.approx([p for _, p in other.words], abs=1e-4)
    assert cut[0] == cut[1] == sum(one.tokens == LIMIT for one in ours)


def test_suppressed_tokens_outside_the_vocabulary_are_ignored(toy, processor, features, monkeypatch):
    expected = decoding.decode_to_text(toy, processor, features[:2], RowDecodingOptions("sv", 4))
    outside = [*toy.generation_config.suppress_tokens, -1, 99_999]
    monkeypatch.setattr(toy.generation_config, "suppress_tokens", outside)
    assert decoding.decode_to_text(toy, processor, features[:2], RowDecodingOptions("sv", 4)) == expected


@pytest.mark.usefixtures("ends")
def test_ended_texts_are_no_longer_computed(toy, processor, features, monkeypatch):
    sizes, append = [], greedy._Decoder.append
    monkeypatch.setattr(
        greedy._Decoder, "append", lambda self, tokens: sizes.append(len(tokens)) or append(self, tokens)
    )
    decoding.decode_to_text(toy, processor, features, RowDecodingOptions("sv", LIMIT))
    assert sizes[0] == len(features)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] <= len(features) / 2
