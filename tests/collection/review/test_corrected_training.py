"""From wrong transcripts over a reviewer's decisions to training: the corrected texts are the labels."""

from __future__ import annotations

import csv

import pytest

from pipelines.collection.review import clips
from pipelines.collection.review.queue import Queue
from pipelines.collection.review.sessions import Sessions
from pipelines.features import pipeline as feature_pipeline
from pipelines.training import pipeline as training_pipeline
from pipelines.whisper import batching
from pipelines.whisper.model import processor as processor_of

WORDS = "båten huset skogen ängen sjön berget vägen bron torget skolan".split()
SPOKEN = [f"{word.title()} ligger {place}." for place in ("nära", "långt bort") for word in WORDS]
SWAPPED = {1: "Klockan är redan tolv.", 4: "Det snöar på fjället.", 13: "Hon läser en tidning."}
"""Number of a training clip to its wrong transcript, which a reviewer corrects."""
UNUSABLE = {7: "Musik och applåder."}
"""Number of a training clip that the reviewer rejects."""


@pytest.fixture
def corpus(tmp_path, encoded, speech):
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = [("path", "text", "split", "speaker")]
    for n, text in enumerate(SPOKEN):
        split = "train" if n < 16 else "validation" if n < 18 else "test"
        (folder / f"{n}.wav").write_bytes(encoded(speech(20_000, seed=n)))
        rows.append((f"{n}.wav", (SWAPPED | UNUSABLE).get(n, text), split, f"{split}-{n}"))
    with open(folder / "metadata.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


def review(recipe, table, runs) -> None:
    """Decide on every clip as a person would who knows what is said."""
    loaded = clips.load(recipe, runs, "", len(SPOKEN))
    sessions = Sessions(Queue(loaded.items, table, loaded.model))
    while showing := sessions.show("page"):
        n = int(showing.item.id)
        verdict = "reject" if n in UNUSABLE else "correct" if n in SWAPPED else "accept"
        sessions.decide("page", showing.token, verdict, SPOKEN[n] if verdict == "correct" else "", "Åsa")


@pytest.mark.slow
def test_model_is_trained_on_corrected_texts(corpus, toy_settings, tmp_path, monkeypatch):
    options = {"source.kind": "folder", "source.path": str(corpus), "training.steps": 12, "training.eval_every": 6}
    table, runs = tmp_path / "corrections.csv", tmp_path / "runs"
    faulty = feature_pipeline.run(toy_settings(options), runs=runs)
    assert {*SWAPPED.values(), *UNUSABLE.values()} <= {*faulty.rows["text"]}
    review(toy_settings(options), table, runs)

    recipe = toy_settings(options | {"curation.corrections": str(table)})
    cache = feature_pipeline.run(recipe, runs=runs)
    assert cache.digest != faulty.digest
    tokenizer, labels = processor_of(recipe).tokenizer, []
    collate = batching.Collator.__call__

    def recorded(self, rows):
        batch = collate(self, rows)
        labels.extend([token for token in row if token != batching.IGNORED] for row in batch["labels"].tolist())
        return batch

    monkeypatch.setattr(batching.Collator, "__call__", recorded)
    training_pipeline.run(recipe, cache, runs=runs)
    trained = {tokenizer.decode(row, skip_special_tokens=True).strip() for row in labels}
    assert {SPOKEN[n] for n in SWAPPED} <= trained
    assert not {*SWAPPED.values(), *UNUSABLE.values(), SPOKEN[7]} & trained
    assert {SPOKEN[n] for n in range(16) if n not in UNUSABLE} <= trained
