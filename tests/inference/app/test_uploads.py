"""Uploaded files and examples."""

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest

from pipelines.inference.app import uploads as app_uploads
from pipelines.inference.app.uploads import EXAMPLES, example_path

gr = pytest.importorskip("gradio")


def test_only_uploads_are_deleted_even_if_refused(handlers, spoken, tmp_path, monkeypatch):
    uploads = tmp_path / "uploads"
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(uploads))
    for content in (Path(spoken).read_bytes(), b"not audio"):
        upload = uploads / "0a1b" / "clip.wav"
        upload.parent.mkdir(parents=True)
        upload.write_bytes(content)
        try:
            handlers.transcribe(str(upload), None, "en")
        except gr.Error:
            pass
        assert not upload.parent.exists()
    handlers.transcribe(spoken, None, "en")
    assert Path(spoken).exists()


def test_examples_are_not_deleted(handlers, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    for name in EXAMPLES:
        upload = tmp_path / "0a1b" / name
        upload.parent.mkdir(exist_ok=True)
        upload.write_bytes(Path(example_path(name)).read_bytes())
        assert handlers.transcribe(str(upload), None, "en")[0]
        assert upload.exists(), "another visitor may have it open"
        upload.write_bytes(Path(write_tone(tmp_path)).read_bytes())
        handlers.transcribe(str(upload), None, "en")
        assert not upload.exists(), "a visitor's own file of that name is deleted"


def write_tone(folder):
    soundfile = pytest.importorskip("soundfile")
    path = folder / "own.wav"
    soundfile.write(path, 0.1 * np.sin(np.arange(16_000, dtype=np.float32) / 20), 16_000)
    return path


def test_temporary_folder_is_deleted_at_end_and_after_a_kill(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    killed, created, old, other = (tmp_path / name for name in ("lab-app-1", "lab-app-2", "lab-app-3", "other"))
    for folder in (killed, created, old, other):
        folder.mkdir()
        (folder / "a.wav").write_bytes(b"few")
    (killed / ".lock").touch()
    os.utime(old, (0, 0))
    (tmp_path / "lab-app-link").symlink_to(other)
    with app_uploads.temporary_folder() as folder:
        with tempfile.NamedTemporaryFile() as file:
            assert Path(file.name).parent == folder, "all temporary files of the process are there"
        (folder / "b.wav").write_bytes(b"few")
        assert not killed.exists()
        assert not old.exists()
        assert created.exists(), "its process may not have locked it yet"
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        with app_uploads.temporary_folder():
            assert (folder / "b.wav").exists(), "its process is running"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lab-app-2", "lab-app-link", "other"]
    assert (other / "a.wav").exists()
