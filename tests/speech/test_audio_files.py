from __future__ import annotations

from pipelines.speech.audio_files import find_audio


def test_hidden_and_other_files_are_skipped_with_a_reason(tmp_path):
    for name in ("a.wav", "b/c.M4A", "b/d.mkv", "b/d.txt", "t.csv", "b/e.docx", "._a.wav", ".ipynb_checkpoints/a.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to(tmp_path / "b")
    found = find_audio(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in found.files] == ["a.wav", "b/c.M4A", "b/d.mkv"]
    assert found.describe_skipped() == (
        "1 a link to a folder (such as link); 2 hidden (such as ._a.wav); 1 not audio by its suffix .docx "
        "(such as b/e.docx)"
    )
