"""Label errors: what a model hears, kept on disk; what differs too much, dropped."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.features import pipeline as feature_pipeline
from pipelines.features.curation import label_errors
from pipelines.features.curation.leaks import fingerprint
from pipelines.whisper import decoding
from pipelines.whisper import model as whisper_model


@pytest.fixture
def ask(toy_cache, toy_settings, toy_model, tmp_path):
    """`ask(rows)`: what the toy model hears in rows of the toy cache, kept in a folder of this test."""

    def heard(rows, **overrides) -> list[str]:
        settings = toy_settings(overrides).evaluation
        ref = replace(whisper_model.resolve(str(toy_model)), context="clip")
        return label_errors.transcribe(toy_cache, np.array(rows), ref, "sv", settings, tmp_path / "heard")

    return heard


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
    """The rows that are really decoded."""
    rows, really = [], decoding.decode_rows_to_text

    def noting(model, processor, cache, asked, *settings):
        rows.extend(asked.tolist())
        return really(model, processor, cache, asked, *settings)

    monkeypatch.setattr(decoding, "decode_rows_to_text", noting)
    return rows


def test_what_is_heard_is_what_decoding_gives_in_the_order_asked_for(ask, toy_cache, toy_model, toy_settings):
    ref, rows = whisper_model.resolve(str(toy_model)), [5, 0, 40]
    plain = decoding.decode_rows_to_text(
        whisper_model.load(ref),
        whisper_model.load_processor(ref, "sv"),
        toy_cache,
        np.array(rows),
        decoding.DecodingOptions("sv", 16, batch_frames=24_000),
    )
    assert len(set(plain)) > 1
    assert ask(rows) == plain


def test_nothing_is_decoded_twice(ask, decoded):
    first = ask([3, 1, 2])
    assert sorted(decoded) == [1, 2, 3]
    assert ask([2, 3, 4, 1])[:2] == [first[2], first[0]]
    assert sorted(decoded) == [1, 2, 3, 4]


def test_what_was_heard_before_a_kill_is_kept(ask, decoded, monkeypatch, tmp_path):
    really, calls = decoding.decode_rows_to_text, []

    def killed(*args, **settings):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return really(*args, **settings)

    monkeypatch.setattr(decoding, "decode_rows_to_text", killed)
    monkeypatch.setattr(label_errors, "_BATCHES", 1)
    rows = list(range(40))
    with pytest.raises(KeyboardInterrupt):
        ask(rows, **{"evaluation.batch_frames": 3_000})
    assert 0 < len(decoded) < 40
    (path,) = (tmp_path / "heard").glob("*.jsonl")
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"clip": "torn", "hea')  # the line that a kill cut short
    heard = ask(rows, **{"evaluation.batch_frames": 3_000})
    assert sorted(decoded) == rows
    assert ask(rows) == heard
    assert sorted(decoded) == rows


def test_of_several_that_ask_at_once_one_decodes(ask, decoded):
    with ThreadPoolExecutor(3) as pool:
        told = [asked.result() for asked in [pool.submit(ask, [4, 0, 9]) for _ in range(3)]]
    assert sorted(decoded) == [0, 4, 9]
    assert told[0] == told[1] == told[2]


def test_what_was_heard_first_is_what_was_heard(ask, toy_cache, tmp_path):
    ask([1])
    (path,) = (tmp_path / "heard").glob("*.jsonl")
    name = fingerprint(toy_cache.log_mel(1))
    path.write_text(label_errors.format_lines({name: "först"}) + label_errors.format_lines({name: "sedan"}))
    assert ask([1]) == ["först"]


def test_another_length_of_transcript_is_another_question(ask, decoded, tmp_path):
    ask([0])
    ask([0], **{"evaluation.max_new_tokens": 2})
    assert decoded == [0, 0]
    assert len(list((tmp_path / "heard").glob("*.jsonl"))) == 2


def test_the_error_rate_is_that_of_characters_without_case_and_signs():
    cers = label_errors.label_cers(["Hej på dig!", "abcd", "ab"], ["hej på dig", "abxd", "abababab"])
    assert cers.tolist() == [0, 0.25, 3]


@pytest.fixture
def stage(toy_settings, toy_model, tmp_path, monkeypatch):
    """`stage(most)`: the features of the toy recipe with this threshold, in runs of this test."""
    ref = replace(whisper_model.resolve(str(toy_model)), context="clip")  # at 30 s the toy has nothing to say
    monkeypatch.setattr(feature_pipeline, "label_model", lambda recipe, runs="": ref)

    def make(most: float):
        recipe = toy_settings({"curation.max_label_cer": most, "source.train": 12})
        return feature_pipeline.run(recipe, runs=tmp_path / "runs")

    return make


def test_the_stage_drops_training_rows_over_the_threshold_and_asks_once(stage, decoded, tmp_path):
    whole = stage(1e9)
    train = whole.split("train")
    assert sorted(decoded) == train.tolist()
    (path,) = (tmp_path / "runs" / "label_errors").glob("*.jsonl")
    told = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line]
    known = {entry["clip"]: entry["heard"] for entry in told}
    assert len(known) == len(told) == 12
    asked = whole.rows.iloc[train]
    texts = [known[fingerprint(whole.log_mel(row))] for row in train]
    cers = label_errors.label_cers(asked["text"].tolist(), texts)
    most = float(np.sort(cers)[5])  # just this much is still allowed
    assert cers.min() <= most < cers.max()
    cache = stage(most)
    assert len(decoded) == 12
    assert cache.rejected["id"].tolist() == asked["id"][cers > most].tolist()
    assert set(cache.rejected["reason"]) == {"label_error"}
    assert "heard" in cache.rejected["detail"][0]
    assert cache.counts["train"] == 12 - len(cache.rejected)
    assert (cache.counts["validation"], cache.counts["test"]) == (8, 12)
    assert cache.digest != whole.digest
    assert cache.curation[-1] == {
        "step": "label_error",
        "before": 32,
        "after": 32 - len(cache.rejected),
        "dropped": len(cache.rejected),
        "changed": 0,
    }


def test_the_name_of_the_file_is_no_secret_of_this_machine(ask, tmp_path):
    ask([0])
    (path,) = (tmp_path / "heard").glob("*.jsonl")
    assert path.name.startswith("heard-")
    assert Path(path.name).suffix == ".jsonl"
    assert str(tmp_path) not in path.read_text("utf-8")


@pytest.mark.parametrize(("context", "full"), [("clip", False), ("full", True)])
def test_a_model_is_asked_at_the_length_it_was_tuned_at(
    toy_cache, toy_settings, toy_model, tmp_path, monkeypatch, context, full
):
    asked = []
    monkeypatch.setattr(
        decoding,
        "decode_rows_to_text",
        lambda m, p, c, r, options, on_clips: asked.append(options.full_context) or ["x"],
    )
    ref = replace(whisper_model.resolve(str(toy_model)), context=context)
    assert label_errors.transcribe(toy_cache, np.array([3]), ref, "sv", toy_settings().evaluation, tmp_path) == ["x"]
    assert asked == [full]
