from __future__ import annotations

import numpy as np
import pytest
import torch
from toy_whisper import END, FIRST_TIMESTAMP, LAST_TIMESTAMP, NO_TIMESTAMPS, START, SWEDISH, TRANSCRIBE

from pipelines.infra.errors import LabError
from pipelines.whisper import decoding, greedy
from pipelines.whisper import model as whisper_model
from pipelines.whisper import tokens as labels
from pipelines.whisper.batching import Collator
from pipelines.whisper.decoding import Hypothesis, RowDecodingOptions
from pipelines.whisper.model import ModelRef

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def toy(toy_model):
    return whisper_model.load(ModelRef("toy", toy_model, "folder", "0"))


@pytest.fixture(scope="module")
def processor(toy_model):
    return whisper_model.load_processor(ModelRef("toy", toy_model, "folder", "0"), "sv")


@pytest.fixture(scope="module")
def rows(toy_cache) -> np.ndarray:
    return toy_cache.split("test")


def decode_rows_to_text(model, processor, cache, rows, on_clips=lambda n: None, **settings) -> list[str]:
    options = RowDecodingOptions(**{"language": "sv", "max_new_tokens": 16, **settings})
    return decoding.decode_rows_to_text(model, processor, cache, rows, options, on_clips)


def by_transformers(model, processor, features: torch.Tensor, max_new_tokens: int) -> list[str]:
    """What transformers' own Whisper generation makes of 30 s windows."""
    options = {
        "language": "sv",
        "task": "transcribe",
        "max_new_tokens": max_new_tokens,
        "num_beams": 1,
        "do_sample": False,
    }
    mask = torch.ones(features.shape[0], features.shape[2], dtype=torch.long)
    out = model.eval().generate(features, attention_mask=mask, return_timestamps=False, **options)
    return [text.strip() for text in processor.batch_decode(out, skip_special_tokens=True)]


def test_text_at_30_s_equals_transformers_generate(toy_model, processor):
    toy = whisper_model.load(ModelRef("toy", toy_model, "folder", "0"))
    # a toy writes time stamps in spite of the prompt, and transformers would go on from them to a second window
    toy.generation_config.suppress_tokens = [
        *toy.generation_config.suppress_tokens,
        *range(FIRST_TIMESTAMP, LAST_TIMESTAMP + 1),
    ]
    scales = torch.tensor([0.1, 0.3, 1.0, 3.0])[:, None, None]
    features = scales * torch.randn(4, 80, 3000, generator=torch.Generator().manual_seed(1))
    ours = decoding.decode_to_text(toy, processor, features, RowDecodingOptions("sv", 12))
    assert ours == by_transformers(toy, processor, features, 12)
    assert len(set(ours)) > 1
    assert all(ours)


@pytest.mark.slow
def test_real_tiny_equals_transformers_generate(tiny_folder, toy_cache, rows):
    ref = ModelRef("tiny", tiny_folder, "folder", "0")
    tiny, processor = whisper_model.load(ref), whisper_model.load_processor(ref, "sv")
    torch.set_num_threads(2)
    features = Collator(toy_cache, full_context=True)(rows[:3].tolist())["input_features"]
    ours = decoding.decode_to_text(tiny, processor, features, RowDecodingOptions("sv", 60))
    torch.set_num_threads(1)
    assert ours == by_transformers(tiny, processor, features, 60)
    assert all(len(text.split()) > 2 for text in ours)


def test_transcripts_keep_the_order_of_rows(toy, processor, toy_cache, rows):
    told = []
    # batches of one clip each, longest first: neither their order nor their number may show
    in_order = decode_rows_to_text(toy, processor, toy_cache, rows, batch_frames=1, on_clips=told.append)
    assert told == [1] * len(rows)
    assert len(set(in_order)) > 3
    frames = toy_cache.rows["frames"].to_numpy()[rows]
    assert list(frames) != sorted(frames, reverse=True)
    shuffled = np.random.default_rng(0).permutation(len(rows))
    again = decode_rows_to_text(toy, processor, toy_cache, rows[shuffled], batch_frames=1)
    assert again == [in_order[i] for i in shuffled]
    assert sum(told) == len(rows)


def test_batched_transcripts_keep_the_order_of_rows(processor, toy_cache, rows, monkeypatch):
    # the loudest value of a clip stands for its transcript: no padding changes it
    sizes = []

    def decode_to_text(model, processor, features, options):
        sizes.append(len(features))
        return [str(float(clip.max())) for clip in features]

    monkeypatch.setattr(decoding, "decode_to_text", decode_to_text)
    found = decode_rows_to_text(None, processor, toy_cache, rows, batch_frames=1_500)
    assert found == [str(float(toy_cache.log_mel(row).frames.max())) for row in rows]
    assert len(set(found)) > 6
    assert max(sizes) > 1
    assert len(sizes) > 1


def test_transcript_does_not_depend_on_the_batch(toy, processor, toy_cache, rows):
    collate = Collator(toy_cache)
    together = collate(rows[:5].tolist())["input_features"]
    batch = decoding.decode_to_text(toy, processor, together, RowDecodingOptions("sv", 12))
    alone = [decoding.decode_to_text(toy, processor, clip[None], RowDecodingOptions("sv", 12))[0] for clip in together]
    assert batch == alone
    assert len(set(batch)) > 1


def test_full_context_pads_every_batch_to_30_s(toy, processor, toy_cache, rows, monkeypatch):
    seen = []
    monkeypatch.setattr(
        decoding, "decode_to_text", lambda m, p, features, options: seen.append(features.shape) or [""] * len(features)
    )
    decode_rows_to_text(toy, processor, toy_cache, rows, batch_frames=9_000, full_context=True)
    assert seen == [(3, 80, 3000)] * 4
    seen.clear()
    decode_rows_to_text(toy, processor, toy_cache, rows, batch_frames=3_000)
    assert sum(shape[0] for shape in seen) == len(rows)
    assert all(shape[0] * shape[2] <= 3_000 for shape in seen)
    assert max(shape[2] for shape in seen) < 1_000


def test_encoder_runs_once_and_the_mode_is_restored(toy, processor, toy_cache, rows):
    calls = []
    handle = toy.model.encoder.register_forward_hook(lambda *args: calls.append(1))
    toy.train()
    features = Collator(toy_cache)(rows[:2].tolist())["input_features"]
    decoding.decode_to_text(toy, processor, features, RowDecodingOptions("sv", 6))
    handle.remove()
    assert calls == [1]
    assert toy.training
    toy.eval()
    decoding.decode_to_text(toy, processor, features, RowDecodingOptions("sv", 2))
    assert not toy.training


def test_dropout_is_off_while_decoding(toy_model, processor, toy_cache, rows):
    noisy = whisper_model.load(ModelRef("toy", toy_model, "folder", "0"), dropout=0.5, spec_augment=True).train()
    assert decode_rows_to_text(noisy, processor, toy_cache, rows[:4]) == decode_rows_to_text(
        noisy, processor, toy_cache, rows[:4]
    )


# ---- which tokens


def generated(model, processor, cache, rows, max_new_tokens=24) -> torch.Tensor:
    features = Collator(cache)(rows.tolist())["input_features"]
    return decoding.generate(model, features, labels.prompt_ids(processor, "sv"), max_new_tokens)


def test_suppressed_tokens_never_appear(toy_model, processor, toy_cache, rows):
    toy = whisper_model.load(ModelRef("toy", toy_model, "folder", "0"))
    free = generated(toy, processor, toy_cache, rows)
    wanted = free[free != END].unique().tolist()[:3]
    toy.generation_config.suppress_tokens = [*toy.generation_config.suppress_tokens, *wanted]
    held = generated(toy, processor, toy_cache, rows)
    assert wanted
    assert not set(held.unique().tolist()) & set(toy.generation_config.suppress_tokens)
    assert not set(free.unique().tolist()) & set(toy.generation_config.suppress_tokens[: -len(wanted)])
    toy.generation_config.begin_suppress_tokens = [*toy.generation_config.begin_suppress_tokens, *held[:, 0].tolist()]
    assert not set(generated(toy, processor, toy_cache, rows)[:, 0].tolist()) & set(held[:, 0].tolist())


def test_generation_stops_and_pads_with_end_tokens(toy, processor, toy_cache, rows):
    assert generated(toy, processor, toy_cache, rows, 5).shape[1] <= 5
    out = generated(toy, processor, toy_cache, rows, 40)
    for tokens in out.tolist():
        ends = [i for i, token in enumerate(tokens) if token == END]
        assert not ends or set(tokens[ends[0] :]) == {END}
    assert START not in out


def test_prompt_sets_language_and_task(processor):
    assert labels.prompt_ids(processor, "sv") == [START, SWEDISH, TRANSCRIBE, NO_TIMESTAMPS]
    assert labels.prompt_ids(processor, "da")[1] == processor.tokenizer.convert_tokens_to_ids("<|da|>") != SWEDISH


def test_language_reaches_the_decoder(toy, processor, toy_cache, rows, monkeypatch):
    prompts, decode = [], greedy.decode
    monkeypatch.setattr(greedy, "decode", lambda *args, **kw: prompts.append(args[2]) or decode(*args, **kw))
    decode_rows_to_text(toy, processor, toy_cache, rows[:1], language="nn")
    assert prompts == [labels.prompt_ids(processor, "nn")]


@pytest.mark.parametrize("language", ["qq", "swedish", ""])
def test_unknown_language_is_one_line(toy, processor, toy_cache, rows, language):
    with pytest.raises(LabError, match="is not one of Whisper's") as caught:
        decode_rows_to_text(toy, processor, toy_cache, rows[:1], language=language)
    assert f"<|{language}|>" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["Hej på dig!", "å ä ö é", "  två  mellanslag ", "<|startoftranscript|>", "200 kr"])
def test_labels_have_no_start_and_one_end(processor, text):
    ids = labels.labeller(processor, "sv")(text)
    assert ids[:3] == [SWEDISH, TRANSCRIBE, NO_TIMESTAMPS]
    assert ids[-1] == END
    assert ids.count(END) == 1
    if "<|" not in text:
        assert START not in ids
        assert processor.tokenizer.decode(ids, skip_special_tokens=True) == text


def test_labels_equal_the_stock_tokenizer_without_start(processor):
    text = "Det regnar i Göteborg, säger hon."
    assert [START, *labels.labeller(processor, "sv")(text)] == processor.tokenizer(text).input_ids


# ---- how sure


def decode_rows(model, processor, cache, rows, **settings) -> list[Hypothesis]:
    return decoding.decode_rows(model, processor, cache, rows, RowDecodingOptions("sv", 16, **settings))


def teacher_forced(model, processor, features: torch.Tensor, text_tokens: list[int]) -> float:
    """The mean log-probability of `text_tokens` in one forward pass, over the tokens that may be written."""
    prompt, known = labels.prompt_ids(processor, "sv"), model.generation_config
    tokens = torch.tensor([[*prompt, *text_tokens]])
    with torch.no_grad():
        logits = model(input_features=features[None], decoder_input_ids=tokens[:, :-1]).logits[0, len(prompt) - 1 :]
    logits[:, known.suppress_tokens] = float("-inf")
    logits[0, known.begin_suppress_tokens] = float("-inf")
    chosen = torch.log_softmax(logits, dim=-1)[range(len(text_tokens)), text_tokens]
    return float(chosen.mean())


def test_logprob_equals_a_teacher_forced_forward_pass(toy_model, processor, toy_cache, rows):
    toy = whisper_model.load(ModelRef("toy", toy_model, "folder", "0"))
    free = generated(toy, processor, toy_cache, rows)
    rare = min(free[:, 1:].unique().tolist(), key=lambda token: abs(int((free == token).any(dim=1).sum()) - 6))
    toy.generation_config.eos_token_id = [END, rare]  # the toy knows no end of its own: now some clips have one
    features = Collator(toy_cache)(rows.tolist())["input_features"]
    heard = decoding.decode(toy, processor, features, RowDecodingOptions("sv", 24))
    own = [tokens[: tokens.index(rare) + 1] if rare in tokens else tokens for tokens in free.tolist()]
    assert [one.tokens for one in heard] == [len(tokens) for tokens in own]
    assert min(map(len, own)) < 24 == max(map(len, own)), "some end, others are cut"
    for clip, tokens, one in zip(features, own, heard, strict=True):
        assert one.logprob == pytest.approx(teacher_forced(toy, processor, clip, tokens), abs=2e-5)
        assert one.logprob < 0


def test_hypotheses_have_the_texts_of_decode_to_text(toy, processor, toy_cache, rows):
    heard = decode_rows(toy, processor, toy_cache, rows)
    assert [one.text for one in heard] == decode_rows_to_text(toy, processor, toy_cache, rows)
    shuffled = np.random.default_rng(0).permutation(len(rows))
    alone = decode_rows(toy, processor, toy_cache, rows, batch_frames=1)
    again = decode_rows(toy, processor, toy_cache, rows[shuffled], batch_frames=1)
    assert again == [alone[i] for i in shuffled]
    assert len({one.logprob for one in alone}) > 3
