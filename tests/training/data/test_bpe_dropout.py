"""Labels with random merges left out: the same text, other tokens, drawn from seed, epoch and row alone."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from toy_whisper import END

from pipelines.training import components
from pipelines.training.data.augmentation import AugmentingCollator, Variation
from pipelines.training.data.bpe_dropout import MergeDropout
from pipelines.training.data.packing import Window, WindowCollator
from pipelines.whisper import model as whisper_model
from pipelines.whisper.batching import IGNORED
from pipelines.whisper.tokens import labeller

TEXTS = ["Det snöar i Kiruna.", "  två  mellanslag", "12,50 kr – “citat” 😀", "<|endoftext|> är text", "l'eau", ""]
DROPPED = {"training.bpe_dropout": 0.5}


@pytest.fixture(scope="module")
def processor(toy_model):
    return whisper_model.load_processor(whisper_model.resolve(str(toy_model)), "sv")


@pytest.fixture(scope="module")
def plain(processor):
    return labeller(processor, "sv")


def test_without_dropout_labels_are_the_tokenizers(plain):
    merges = MergeDropout(plain, 0.0, seed=1)
    assert [merges.labels(text, 0, row) for row, text in enumerate(TEXTS)] == [plain(text) for text in TEXTS]


def test_dropped_merges_spell_the_same_text_in_more_tokens(plain):
    merges, n_tokens = MergeDropout(plain, 0.5, seed=1), 0
    for row, text in enumerate(TEXTS):
        ids = merges.labels(text, 0, row)
        assert plain.tokenizer.decode(ids[3:-1]) == plain.tokenizer.decode(plain(text)[3:-1])
        assert (ids[:3], ids[-1:]) == (list(plain.prefix), list(plain.suffix))
        n_tokens += len(ids)
    assert n_tokens > sum(len(plain(text)) for text in TEXTS)


def test_share_of_dropped_merges_is_the_probability(plain):
    merges, rng = MergeDropout(plain, 0.3, seed=1), np.random.default_rng(0)
    first, second = max(merges.ranks, key=lambda pair: len("".join(pair)) == 2)
    kept = [len(merges.tokens(first + second, rng)) == 1 for _ in range(2_000)]
    assert np.mean(kept) == pytest.approx(0.7, abs=0.03)


def test_draw_depends_on_seed_epoch_and_row_alone(plain):
    text = "Det snöar och blåser hela natten i Kiruna."
    draws = ((1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1))
    labels = {draw: MergeDropout(plain, 0.5, draw[0]).labels(text, *draw[1:]) for draw in draws}
    assert len(set(map(tuple, labels.values()))) == 4
    copy = pickle.loads(pickle.dumps(MergeDropout(plain, 0.5, 1)))  # as a loader's worker has it
    copy.labels(text, 5, 5)
    assert copy.labels(text, 0, 0) == labels[1, 0, 0]


def test_label_beyond_the_decoder_is_written_without_dropout(plain):
    text = " ".join(["snöar"] * 100)
    assert len(plain(text)) < 448
    assert MergeDropout(plain, 0.95, 1).labels(text, 0, 0) == plain(text)


def test_training_batches_are_dropped_and_validation_is_not(toy_settings, toy_cache, processor):
    settings = toy_settings({**DROPPED, "training.batch_size": 4})
    same = {}
    for split in ("train", "validation"):
        loader = components.build_loader(settings, toy_cache, processor, split)
        stored = sorted(tuple(toy_cache.labels(int(row))) for row in toy_cache.split(split))
        read = [[int(one) for one in ids if one != IGNORED] for batch in loader for ids in batch["labels"]]
        same[split] = sorted(map(tuple, read)) == stored
    assert same == {"train": False, "validation": True}


@pytest.mark.parametrize("timestamps", [False, True])
def test_windows_are_dropped_by_their_first_clip(toy_cache, processor, plain, timestamps):
    merges = MergeDropout(plain, 0.5, seed=1)
    clips = AugmentingCollator(toy_cache, Variation(), merges)
    dropping, whole = (WindowCollator(clips, processor, "sv", drop) for drop in (merges, None))
    windows = [Window([(epoch, 0), (epoch, 1)], timestamps) for epoch in (0, 0, 1)]
    first, again, other = (dropping.window(window)[1] for window in windows)
    assert first == again != other
    spelt = [
        plain.tokenizer.decode([one for one in ids if one < END]) for ids in (first, other, whole.window(windows[0])[1])
    ]
    assert len(set(spelt)) == 1


def test_window_of_one_long_clip_is_written_without_dropout(toy_cache, processor, plain):
    merges = MergeDropout(plain, 0.95, seed=1)
    collate = WindowCollator(AugmentingCollator(toy_cache, Variation(), merges), processor, "sv", merges)
    collate.transcripts = [" ".join(["snöar"] * 100)]
    assert collate.window(Window([(0, 0)]))[1] == plain(collate.transcripts[0])
