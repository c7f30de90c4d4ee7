"""From a folder of recordings and texts to a feature cache; and a run that is killed while it decodes."""

import csv
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soundfile

from pipelines.features import pipeline as feature_pipeline
from pipelines.features.sources.aligned import aligner as aligners
from pipelines.features.sources.aligned import hypotheses
from pipelines.features.sources.aligned.source import AlignedSource
from pipelines.whisper import model as whisper_model
from tests.features.sources.aligned.test_source import PARAPHRASED, SENTENCES, engine, folder  # noqa: F401  fixtures

ROOT = Path(__file__).parents[4]


def test_aligned_folder_becomes_a_cache_once(engine, folder, toy_settings, tmp_path):  # noqa: F811
    own = {"source.kind": "aligned", "source.path": str(folder), "features.max_rejected_share": 0.3}
    recipe = toy_settings(own)
    cache = feature_pipeline.run(recipe, runs=tmp_path / "runs")
    said = [text for n, text in enumerate(SENTENCES) if n != PARAPHRASED]
    assert sorted(cache.rows["text"]) == sorted(said)
    assert {*cache.rows["split"]} == {"train", "validation", "test"}
    with open(cache.rejected_path, encoding="utf-8", newline="") as file:
        assert [(row["reason"], row["split"]) for row in csv.DictReader(file)] == [("paraphrased", "train")]
    n_decoded = engine.n_decoded
    assert feature_pipeline.run(recipe, runs=tmp_path / "runs").digest == cache.digest
    text = folder / "talk.vtt"
    text.write_text(text.read_text("utf-8").replace("Låten är svår att glömma.", SENTENCES[PARAPHRASED]), "utf-8")
    corrected = feature_pipeline.run(recipe, runs=tmp_path / "runs")
    assert corrected.digest != cache.digest
    assert len(corrected.rows) == len(SENTENCES)
    assert engine.n_decoded == n_decoded


KILLED = """
import sys
from pipelines.features.sources import journal
from pipelines.features.sources.aligned import hypotheses, source
journal._BATCH = 1
hypotheses.detection.open_detector = hypotheses.detection.AnySound
list(source.AlignedSource(sys.argv[1], sys.argv[2]).examples())
"""


@pytest.mark.slow
def test_killed_run_decodes_no_stored_window_twice(toy_model, speech, tmp_path, monkeypatch):
    talks, cache = tmp_path / "talks", tmp_path / "cache"
    talks.mkdir()
    soundfile.write(talks / "talk.flac", speech(16_000 * 300), 16_000)
    (talks / "talk.txt").write_text(" ".join(SENTENCES), "utf-8")
    monkeypatch.setenv("LAB_CACHE", str(cache))
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(talks), str(toy_model)], cwd=ROOT)
    stored = []
    while len(stored) < 3 and process.poll() is None:
        time.sleep(0.01)
        stored = [row for path in cache.glob("aligned/*.jsonl") for row in path.read_bytes().splitlines(keepends=True)]
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    (journal,) = cache.glob("aligned/*.jsonl")
    before = [row for row in journal.read_bytes().splitlines(keepends=True) if row.endswith(b"\n")]
    assert not any(row.startswith(b'{"end"') for row in before)

    opened = aligners.open_aligner(whisper_model.resolve(str(toy_model)), "sv")
    decoded, decode = [], opened.decode
    monkeypatch.setattr(opened, "decode", lambda windows: decoded.extend(windows) or decode(windows))
    monkeypatch.setattr(hypotheses.detection, "open_detector", hypotheses.detection.AnySound)
    assert list(AlignedSource(str(talks), str(toy_model)).examples())
    rows = journal.read_bytes().splitlines(keepends=True)
    assert rows[: len(before)] == before
    assert len(decoded) == len(rows) - len(before) - 1 > 0
    (again,) = cache.glob("aligned/*.jsonl")
    assert again == journal
