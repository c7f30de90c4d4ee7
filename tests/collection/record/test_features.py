"""From takes to a feature cache: the folder is built as it is, without touching a file by hand."""

import pytest

from pipelines.collection.record.folder import Terms, open_folder
from pipelines.collection.record.recorder import Recorder
from pipelines.features import pipeline, rejections
from pipelines.features.sources import SPLITS
from pipelines.speech.recordings import detection

SENTENCES = [f"Mening nummer {word}." for word in "ett två tre fyra fem sex sju åtta nio tio elva tolv".split()]


@pytest.mark.parametrize(("n_speakers", "n_takes"), [(1, 6), (2, 12), (8, 3)])
def test_features_are_built_from_takes(tmp_path, toy_settings, encoded, speech, monkeypatch, n_speakers, n_takes):
    monkeypatch.setattr(detection, "is_packaged", lambda: False)
    folder, lock = open_folder(tmp_path / "set", Terms("sv", "CC0-1.0", {}))
    recorder = Recorder(SENTENCES, folder)
    for speaker in range(n_speakers):
        session = recorder.start(f"speaker {speaker}")
        for number in range(n_takes):
            path = tmp_path / "take.wav"
            path.write_bytes(encoded(speech(20_000, seed=100 * speaker + number)))
            session = recorder.store(recorder.check(session, str(path)))
    lock.release()
    settings = toy_settings({"source.kind": "folder", "source.path": str(folder.path)})
    cache = pipeline.run(settings, runs=tmp_path / "runs")
    assert rejections.as_dict(cache)["rejected"] == []
    assert all(len(cache.split(name)) for name in SPLITS)
