"""Label errors: transcripts of a model, stored on disk; clips that differ too much are dropped."""

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
def transcribe(toy_cache, toy_settings, toy_model, tmp_path):
    """`transcribe(rows)` transcribes rows of the toy cache with the toy model and stores the results in tmp_path."""

    def run(rows, **overrides) -> list[str]:
        settings = toy_settings(overrides).evaluation
        ref = replace(whisper_model.resolve(str(toy_model)), context="clip")
        return label_errors.transcribe(toy_cache, np.array(rows), ref, "sv", settings, tmp_path / "heard")

    return run


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
    """The rows that are decoded, not read from disk."""
    rows, decode = [], decoding.decode_rows_to_text

    def record(model, processor, cache, indices, *settings):
        rows.extend(indices.tolist())
        return decode(model, processor, cache, indices, *settings)

    monkeypatch.setattr(decoding, "decode_rows_to_text", record)
    return rows


def test_transcripts_match_decoding_in_requested_order(transcribe, toy_cache, toy_model, toy_settings):
    ref, rows = whisper_model.resolve(str(toy_model)), [5, 0, 40]
    plain = decoding.decode_rows_to_text(
        whisper_model.load(ref),
        whisper_model.load_processor(ref, "sv"),
        toy_cache,
        np.array(rows),
        decoding.RowDecodingOptions("sv", 16, batch_frames=24_000),
    )
    assert len(set(plain)) > 1
    assert transcribe(rows) == plain


def test_stored_transcripts_are_not_decoded_again(transcribe, decoded):
    first = transcribe([3, 1, 2])
    assert sorted(decoded) == [1, 2, 3]
    assert transcribe([2, 3, 4, 1])[:2] == [first[2], first[0]]
    assert sorted(decoded) == [1, 2, 3, 4]


def test_transcripts_before_an_interrupt_are_kept(transcribe, decoded, monkeypatch, tmp_path):
    decode, calls = decoding.decode_rows_to_text, []

    def killed(*args, **settings):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return decode(*args, **settings)

    monkeypatch.setattr(decoding, "decode_rows_to_text", killed)
    monkeypatch.setattr(label_errors, "_BATCHES", 1)
    rows = list(range(40))
    with pytest.raises(KeyboardInterrupt):
        transcribe(rows, **{"evaluation.batch_frames": 3_000})
    assert 0 < len(decoded) < 40
    (path,) = (tmp_path / "heard").glob("*.jsonl")
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"clip": "torn", "hea')  # the line that a kill cut short
    transcripts = transcribe(rows, **{"evaluation.batch_frames": 3_000})
    assert sorted(decoded) == rows
    assert transcribe(rows) == transcripts
    assert sorted(decoded) == rows


def test_concurrent_calls_decode_once(transcribe, decoded):
    with ThreadPoolExecutor(3) as pool:
        results = [future.result() for future in [pool.submit(transcribe, [4, 0, 9]) for _ in range(3)]]
    assert sorted(decoded) == [0, 4, 9]
    assert results[0] == results[1] == results[2]


def test_first_stored_transcript_wins(transcribe, toy_cache, tmp_path):
    transcribe([1])
    (path,) = (tmp_path / "heard").glob("*.jsonl")
    name = fingerprint(toy_cache.log_mel(1))
    path.write_text(label_errors.format_lines({name: "först"}) + label_errors.format_lines({name: "sedan"}))
    assert transcribe([1]) == ["först"]


def test_other_max_new_tokens_decodes_again(transcribe, decoded, tmp_path):
    transcribe([0])
    transcribe([0], **{"evaluation.max_new_tokens": 2})
    assert decoded == [0, 0]
    assert len(list((tmp_path / "heard").glob("*.jsonl"))) == 2


def test_label_cers_ignore_case_and_punctuation():
    cers = label_errors.label_cers(["Hej på dig!", "abcd", "ab"], ["hej på dig", "abxd", "abababab"])
    assert cers.tolist() == [0, 0.25, 3]


@pytest.fixture
def stage(toy_settings, toy_model, tmp_path, monkeypatch):
    """`stage(limit)` builds the toy recipe's cache with this max_label_cer."""
    ref = replace(whisper_model.resolve(str(toy_model)), context="clip")  # at 30 s the toy has nothing to say
    monkeypatch.setattr(feature_pipeline, "label_model", lambda recipe, runs="": ref)

    def make(limit: float):
        recipe = toy_settings({"curation.max_label_cer": limit, "source.train": 12})
        return feature_pipeline.run(recipe, runs=tmp_path / "runs")

    return make


def test_stage_drops_label_errors_and_decodes_once(stage, decoded, tmp_path):
    uncurated = stage(1e9)
    train = uncurated.split("train")
    assert sorted(decoded) == train.tolist()
    (path,) = (tmp_path / "runs" / "label_errors").glob("*.jsonl")
    entries = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line]
    transcripts = {entry["clip"]: entry["heard"] for entry in entries}
    assert len(transcripts) == len(entries) == 12
    rows = uncurated.rows.iloc[train]
    texts = [transcripts[fingerprint(uncurated.log_mel(row))] for row in train]
    cers = label_errors.label_cers(rows["text"].tolist(), texts)
    limit = float(np.sort(cers)[5])  # a CER equal to the limit is accepted
    assert cers.min() <= limit < cers.max()
    cache = stage(limit)
    assert len(decoded) == 12
    assert cache.rejected["id"].tolist() == rows["id"][cers > limit].tolist()
    assert set(cache.rejected["reason"]) == {"label_error"}
    assert "heard" in cache.rejected["detail"][0]
    assert cache.counts["train"] == 12 - len(cache.rejected)
    assert (cache.counts["validation"], cache.counts["test"]) == (8, 12)
    assert cache.digest != uncurated.digest
    assert cache.curation[-1] == {
        "step": "label_error",
        "before": 32,
        "after": 32 - len(cache.rejected),
        "dropped": len(cache.rejected),
        "changed": 0,
    }


def test_transcript_file_contains_no_local_path(transcribe, tmp_path):
    transcribe([0])
    (path,) = (tmp_path / "heard").glob("*.jsonl")
    assert path.name.startswith("heard-")
    assert Path(path.name).suffix == ".jsonl"
    assert str(tmp_path) not in path.read_text("utf-8")


@pytest.mark.parametrize(("context", "full"), [("clip", False), ("full", True)])
def test_model_decodes_at_its_training_context(
    toy_cache, toy_settings, toy_model, tmp_path, monkeypatch, context, full
):
    contexts = []
    monkeypatch.setattr(
        decoding,
        "decode_rows_to_text",
        lambda m, p, c, r, options, on_clips: contexts.append(options.full_context) or ["x"],
    )
    ref = replace(whisper_model.resolve(str(toy_model)), context=context)
    assert label_errors.transcribe(toy_cache, np.array([3]), ref, "sv", toy_settings().evaluation, tmp_path) == ["x"]
    assert contexts == [full]
