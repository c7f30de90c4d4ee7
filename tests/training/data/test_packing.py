from __future__ import annotations

import collections

import numpy as np
import pytest
from toy_whisper import END, FIRST_TIMESTAMP, NO_TIMESTAMPS, START, SWEDISH, TRANSCRIBE

from pipelines import recipes
from pipelines.infra.errors import LabError
from pipelines.speech.audio import Waveform
from pipelines.training import loop as training_loop
from pipelines.training import run as training_run
from pipelines.training.data import packing
from pipelines.training.data.augmentation import AugmentingCollator, EpochClips, Variation
from pipelines.training.data.packing import Window, WindowClips, WindowCollator, WindowOptions, WindowSampler
from pipelines.training.run import TrainingRun
from pipelines.whisper import log_mel as features
from pipelines.whisper import model as whisper_model
from pipelines.whisper import tokens
from pipelines.whisper.batching import IGNORED, Collator
from pipelines.whisper.log_mel import HOP_SAMPLES

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTHS = np.random.default_rng(3).integers(90, 900, size=200)


@pytest.fixture(scope="module")
def processor(toy_model):
    return whisper_model.load_processor(whisper_model.resolve(str(toy_model)), "sv")


@pytest.fixture(scope="module")
def collator(toy_cache, processor):
    return lambda **told: WindowCollator(Collator(toy_cache), processor, "sv", **told)


def epochs(sampler: WindowSampler, count: int) -> list[list]:
    drawn = []
    for epoch in range(count):
        sampler.set_epoch(epoch)
        drawn.append(list(sampler))
    return drawn


def windows_of(batches: list) -> list[Window]:
    return [window for batch in batches if isinstance(batch[0], Window) for window in batch]


def sampler_of(*order, share=0.5, with_epoch=False, **options) -> WindowSampler:
    return WindowSampler(*order, options=WindowOptions(share, **options), with_epoch=with_epoch)


# ---- joining


def test_joined_log_mels_match_except_at_borders(speech):
    sizes, peaks = (30_000, 50_123, 16_001), (0.5, 0.01, 0.9)
    clips = [speech(n, seed=n, peak=peak) for n, peak in zip(sizes, peaks)]
    parts = [features.extract(Waveform(clip)) for clip in clips]
    joined = packing.join(parts)
    padded = [np.pad(clip, (0, len(part.frames) * HOP_SAMPLES - len(clip))) for clip, part in zip(clips, parts)]
    whole = features.extract(Waveform(np.concatenate(padded)))
    n = len(joined.frames)
    assert n == sum(len(part.frames) for part in parts)
    starts = np.cumsum([0, *(len(part.frames) for part in parts)])
    borders = {start + offset for start in starts[1:-1] for offset in (-1, 0, 1)} | {n - 1}
    inside = np.array([i for i in range(n) if i not in borders])
    assert np.abs(joined.frames[inside] - whole.frames[:n][inside]).max() < 1e-5
    assert joined.pad_value == pytest.approx(whole.pad_value, abs=1e-6)
    # the quiet clip's own floor is far below that of the window
    assert parts[1].frames.min() < joined.frames.min() - 0.1


def test_count_of_clips_within_30_seconds():
    assert packing.count_within_30_s([1000, 1000, 1000, 1]) == 3
    assert packing.count_within_30_s([1000, 1000, 1001]) == 2
    assert packing.count_within_30_s([3000, 10]) == 1


# ---- the sampler


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("batch_size", [4, 16])
@pytest.mark.parametrize("fill", ["full", "random"])
def test_each_epoch_has_each_clip_once_in_equal_batches(share, batch_size, fill):
    sampler = sampler_of(LENGTHS, batch_size, 5, 1, share=share, fill=fill)
    for batches in epochs(sampler, 4):
        assert len(batches) == len(sampler)
        joined = [clip for window in windows_of(batches) for clip in window.clips]
        apart = [clip for batch in batches if not isinstance(batch[0], Window) for clip in batch]
        assert collections.Counter(joined + apart) == collections.Counter(range(200))
        assert len(joined) == max(1, round(share * 200))
        assert all(window.clips for window in windows_of(batches))
        assert max((len(batch) for batch in batches if not isinstance(batch[0], Window)), default=0) <= batch_size
        assert all(isinstance(window, Window) for batch in batches for window in batch if isinstance(batch[0], Window))


def test_windows_are_about_30_s_and_redrawn_each_epoch():
    sampler = sampler_of(LENGTHS, 16, 5, 1)
    first, second = ([window.clips for window in windows_of(batches)] for batches in epochs(sampler, 2))
    assert sorted(map(sorted, first)) != sorted(map(sorted, second))
    sums = [sum(LENGTHS[window]) for window in first + second]
    assert 2_700 < np.mean(sums) < 3_300
    assert 1_200 < min(sums) and max(sums) < 4_800
    # a batch holds about the speech of 16 clips
    sizes = {len(batch) for batch in epochs(sampler, 1)[0] if isinstance(batch[0], Window)}
    assert max(sizes) == int(16 * LENGTHS.mean() / 3000) == 2


def test_random_windows_hold_one_clip_to_as_many_as_fit():
    lengths = np.full(600, 300)
    drawn = epochs(sampler_of(lengths, 8, 5, 1, share=1.0, fill="random"), 3)
    counts = np.bincount([min(10, len(window.clips)) for batches in drawn for window in windows_of(batches)])
    assert counts[1:9].min() > 0.04 * counts.sum(), "every number of clips is drawn"
    assert counts[9:].sum() > 0.04 * counts.sum()
    assert {len(windows_of(batches)) for batches in drawn} == {600 / 5}


def test_only_seed_and_epoch_decide_the_draw():
    options = {"share": 0.3, "fill": "random", "timestamps": 0.5, "prompt": 0.5}
    one, other, third = (sampler_of(LENGTHS, 8, 5, seed, **options) for seed in (1, 1, 2))
    np.random.seed(9)
    list(one)
    assert epochs(one, 3) == epochs(other, 3) != epochs(third, 3)
    other.set_epoch(2)
    assert list(other) == epochs(one, 3)[2]


def test_windows_are_mixed_among_the_batches():
    (batches,) = epochs(sampler_of(LENGTHS, 4, 5, 1), 1)
    places = [i for i, batch in enumerate(batches) if isinstance(batch[0], Window)]
    assert places[0] < len(batches) / 2 < places[-1]
    assert places != list(range(places[0], places[-1] + 1))


def test_timestamps_and_prompts_are_drawn_by_probability():
    (plain,) = epochs(sampler_of(LENGTHS, 4, 5, 1, share=1.0), 1)
    (batches,) = epochs(sampler_of(LENGTHS, 4, 5, 1, share=1.0, timestamps=0.3, prompt=0.7), 1)
    windows, before = windows_of(batches), windows_of(plain)
    assert [window.clips for window in windows] == [window.clips for window in before], "the clips stay the same"
    assert not any(window.timestamps or window.before for window in before)
    assert 0.1 < np.mean([window.timestamps for window in windows]) < 0.5
    prompted = [window for window in windows if window.before]
    assert 0.5 < len(prompted) / len(windows) < 0.9
    assert all(window.before in [other.clips for other in windows if other != window] for window in prompted)


# ---- the batches


def test_window_batch_is_30_s_with_joined_transcripts(toy_cache, collator, processor):
    rows = toy_cache.split("train").tolist()
    lengths = toy_cache.rows["frames"].to_numpy()
    batch = collator()([Window(rows[:3]), Window(rows[3:8])])
    assert "decoder_input_ids" not in batch
    assert batch["input_features"].shape == (2, 80, 3000)
    for mask, told, window in zip(batch["attention_mask"], batch["labels"], (rows[:3], rows[3:8])):
        assert int(mask.sum()) == lengths[window].sum()
        told = [id for id in told.tolist() if id != IGNORED]
        tokenizer = processor.tokenizer
        text = " ".join(toy_cache.rows["text"].iloc[window])
        assert told[:3] == [SWEDISH, TRANSCRIBE, NO_TIMESTAMPS]
        assert tokenizer.decode(told[3:-1]) == text
        assert told[-1] == END
    first = toy_cache.log_mel(rows[0]).frames
    found = batch["input_features"][0, :, : len(first)].numpy().T
    assert np.array_equal(found, np.maximum(first, batch["input_features"][0].min().item()))


def test_timestamps_mark_each_clip(toy_cache, collator, processor):
    rows = toy_cache.split("train").tolist()[:4]
    lengths, texts = toy_cache.rows["frames"].to_numpy()[rows], toy_cache.rows["text"].iloc[rows].tolist()
    ids = collator().window(Window(rows, timestamps=True))[1]
    assert ids[:2] == [SWEDISH, TRANSCRIBE]
    assert NO_TIMESTAMPS not in ids
    times = [(id - FIRST_TIMESTAMP) * 0.02 for id in ids if id >= FIRST_TIMESTAMP]
    ends = np.cumsum(lengths) * 0.01
    assert len(times) == 8
    assert times[0::2] == pytest.approx([0, *ends[:-1]], abs=0.011)
    assert times[1::2] == pytest.approx(ends, abs=0.011)
    tokenizer = processor.tokenizer
    assert tokenizer.decode(ids[2:-1], decode_with_timestamps=True).startswith(f"<|0.00|> {texts[0]}<|")
    assert tokenizer.decode(ids, skip_special_tokens=True).split() == " ".join(texts).split()


def test_clip_cut_by_the_windows_end_has_its_start_only(toy_cache, collator):
    rows = toy_cache.split("train").tolist()
    lengths, texts = toy_cache.rows["frames"].to_numpy()[rows], toy_cache.rows["text"].iloc[rows].tolist()
    count = packing.count_within_30_s(lengths)
    end, made = int(lengths[:count].sum()), collator(cut_last=True)
    assert 3000 - end >= 20, "another corpus is required"
    log_mel, ids = made.window(Window(rows, timestamps=True))
    assert len(log_mel.frames) == 3000
    assert [(id - FIRST_TIMESTAMP) * 2 for id in ids[-3:-1]] == pytest.approx([end, end], abs=1)
    text = made.labeller.tokenizer.decode([id for id in ids if id < END])
    assert text.split() == " ".join(texts[:count]).split()
    for whole in (Window(rows), Window(rows[:count], timestamps=True)):
        assert len(made.window(whole)[0].frames) == end


def test_prompt_is_the_text_before_and_has_no_loss(toy_cache, collator, processor):
    rows, tokenizer = toy_cache.split("train").tolist(), processor.tokenizer
    texts = toy_cache.rows["text"].iloc[rows].tolist()
    plain, prompted = Window(rows[:2]), Window(rows[2:3], before=rows[3:5])
    batch = collator()([plain, prompted])
    inputs, labels = batch["decoder_input_ids"].tolist(), batch["labels"].tolist()
    start = inputs[1].index(START)
    assert tokenizer.decode(inputs[1][:1]) == "<|startofprev|>"
    assert tokenizer.decode(inputs[1][1:start]) == f" {texts[3]} {texts[4]}"
    assert set(labels[1][:start]) == {IGNORED}
    spoken = [id for id in labels[1][start:] if id != IGNORED]
    assert tokenizer.decode(spoken, skip_special_tokens=True) == texts[2]
    # each label is the next input, in both windows
    for row, told in zip(inputs, labels):
        known = [(i, id) for i, id in enumerate(told[:-1]) if id not in (IGNORED, END)]
        assert all(row[i + 1] == id for i, id in known)
    assert inputs[0][0] == START


def test_long_prompt_keeps_its_last_tokens(toy_cache, collator):
    rows, made = toy_cache.split("train").tolist(), collator()
    window = Window(rows[:1], before=rows * 9)
    assert len(made.prompt(window, 100)) == 224
    assert len(made.prompt(window, 300)) == 448 - 300
    assert made.prompt(window, 447) == []
    assert made.prompt(window, 300)[1:] == made.prompt(window, 100)[-147:]


def test_clip_without_speech_adds_no_text(toy_cache, collator):
    rows = toy_cache.split("train").tolist()[:3]
    texts = toy_cache.rows["text"].iloc[rows].tolist()
    for timestamps, n_times in ((False, 0), (True, 4)):
        made = collator()
        made.transcripts = made.transcripts.copy()
        made.transcripts[rows[1]] = ""
        ids = made.window(Window(rows, timestamps))[1]
        text = made.labeller.tokenizer.decode([id for id in ids if id < END])
        assert text.split() == f"{texts[0]} {texts[2]}".split()
        assert sum(id >= FIRST_TIMESTAMP for id in ids) == n_times


def test_clips_beyond_30_s_or_the_decoder_are_left_out(toy_cache, collator, monkeypatch):
    rows = toy_cache.split("train").tolist()
    lengths = toy_cache.rows["frames"].to_numpy()[rows]
    made = collator()
    log_mel, ids = made.window(Window(rows))
    count = packing.count_within_30_s(lengths)
    assert count < len(rows)
    assert len(log_mel.frames) == lengths[:count].sum() <= 3000
    whole = len(ids)
    monkeypatch.setattr(packing, "MAX_LABEL_TOKENS", whole - 1)
    log_mel, ids = made.window(Window(rows))
    assert len(ids) < whole
    assert len(log_mel.frames) == lengths[: count - 1].sum()


def test_window_has_the_epochs_augmented_clips(toy_cache, processor):
    rows, variation = toy_cache.split("train"), Variation(gain_db=20, seed=3)
    made = WindowCollator(AugmentingCollator(toy_cache, variation), processor, "sv")
    sampler = sampler_of(toy_cache.rows["frames"].to_numpy()[rows], 4, 5, 1, with_epoch=True)
    clips = WindowClips(EpochClips(toy_cache, rows))
    found = []
    for batches in epochs(sampler, 2):
        windowed = next(batch for batch in batches if isinstance(batch[0], Window))
        plain = next(batch for batch in batches if not isinstance(batch[0], Window))
        assert made([clips[told] for told in plain])["input_features"].shape[2] < 3000
        told = clips[windowed[0]]
        found.append(epoch := told.clips[0][0])
        expected = variation.apply(toy_cache.log_mel(told.clips[0][1]), epoch, told.clips[0][1]).frames
        log_mel, _ = made.window(told)
        assert np.array_equal(log_mel.frames[: len(expected)], np.maximum(expected, log_mel.frames.min()))
    assert found == [0, 1]


def test_row_text_equals_text_of_its_labels(toy_cache, processor):
    for row in toy_cache.split("train"):
        assert tokens.labeller(processor, "sv")(toy_cache.rows["text"].iloc[row]) == toy_cache.labels(row)


# ---- in a run


def test_run_has_clips_at_length_and_windows_at_30_s(toy_settings, toy_cache, toy_model, tmp_path):
    base = whisper_model.resolve(str(toy_model))
    settings = toy_settings({"training.window_share": 0.5, "training.steps": 9, "training.eval_every": 9})
    trainer = training_loop._build_trainer(TrainingRun(settings, toy_cache, base, tmp_path))
    trainer.validate = lambda model: {"wer": 1.0, "loss": 1.0}
    shapes, collate = [], trainer.data_collator
    trainer.data_collator = lambda rows: shapes.append(tuple((made := collate(rows))["input_features"].shape)) or made
    trainer.train()
    assert len(trainer.sampler) == 6 + 2
    full = [shape for shape in shapes[:8] if shape[2] == 3000]
    assert [shape[0] for shape in full] == [1, 1]
    assert all(shape[0] == 4 for shape in shapes[:8] if shape[2] < 3000)


def test_window_settings_are_in_the_identity_if_used(toy_settings, toy_cache, toy_model):
    base = whisper_model.resolve(str(toy_model))
    plain = training_run.run_identity(toy_settings(), toy_cache, base)
    told = training_run.run_identity(toy_settings({"training.window_share": 0.5}), toy_cache, base)
    assert set(told.items()) - set(plain.items()) == {("training.window_share", 0.5)}


@pytest.mark.parametrize(("name", "value"), [("fill", "random"), ("timestamps", True), ("prompt", 0.5)])
def test_window_settings_without_windows_are_refused(toy_recipe, name, value):
    with pytest.raises(LabError, match=f"training.window_{name} is set, so training.window_share must be above 0"):
        recipes.load(toy_recipe, {f"training.window_{name}": value})


def test_share_of_0_switches_windows_of_a_recipe_off():
    settings = recipes.load("tour", {"training.window_share": 0}).changed("training")
    assert recipes.load("tour").training.window_share and not [name for name in settings if "window" in name]


@pytest.mark.parametrize(("given", "recorded"), [(True, True), (1, True), (0.5, 0.5), (0.0, False)])
def test_timestamps_are_recorded_as_earlier_recipes_were(toy_settings, given, recorded):
    settings = toy_settings({"training.window_share": 0.5, "training.window_timestamps": given}).settings("training")
    assert (
        settings["training.window_timestamps"] is recorded or settings["training.window_timestamps"] == recorded == 0.5
    )
