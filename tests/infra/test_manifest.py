from __future__ import annotations

import errno
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipelines.infra import manifest
from pipelines.infra.errors import LabError


@pytest.fixture
def sealed(tmp_path):
    folder = tmp_path / "artefact"
    (folder / "inner").mkdir(parents=True)
    (folder / "a.bin").write_bytes(b"0123456789")
    (folder / "inner" / "å.txt").write_bytes(b"")
    manifest.seal(folder, kind="toy", step=3)
    return folder


def test_seal_lists_every_file_and_field(sealed):
    content = json.loads((sealed / "manifest.json").read_text("utf-8"))
    assert (
        content
        == manifest.read(sealed)
        == {
            "kind": "toy",
            "step": 3,
            "files": {
                "a.bin": {"bytes": 10, "sha256": hashlib.sha256(b"0123456789").hexdigest()},
                "inner/å.txt": {"bytes": 0, "sha256": hashlib.sha256().hexdigest()},
            },
        }
    )
    assert manifest.problem(sealed) is None
    assert manifest.require_complete(sealed, "toy", "Build it") == content


def test_second_seal_omits_manifest_and_partial_files(sealed):
    (sealed / ".a.bin.partial").write_bytes(b"half")
    assert set(manifest.seal(sealed)["files"]) == {"a.bin", "inner/å.txt"}


def test_manifest_is_written_after_every_file(tmp_path, monkeypatch):
    """Files are flushed first: a kill before the manifest's own rename leaves an unfinished folder."""
    (tmp_path / "a.bin").write_bytes(b"1")
    monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        manifest.seal(tmp_path)
    assert manifest.problem(tmp_path) == "unfinished (it has no manifest)"


def test_problem_names_the_file_and_the_fault(sealed):
    def change(data: bytes | None) -> str:
        (sealed / "a.bin").unlink(missing_ok=True)
        if data is not None:
            (sealed / "a.bin").write_bytes(data)
        return manifest.problem(sealed)

    assert change(b"012345678") == "a.bin has 9 bytes, not 10"
    assert change(b"0123456780") == "a.bin is damaged (its sha256 differs)"
    assert manifest.problem(sealed, thorough=False) is None  # sizes alone
    assert change(None) == "a.bin is missing"
    assert change(b"0123456789") is None


def test_missing_or_invalid_manifest_is_a_problem(sealed, tmp_path):
    assert manifest.problem(tmp_path / "nowhere") == "absent"
    for nonsense in (b"", b"{", b"[]", b"{}", b'{"files": []}', b"\xff\xfe", b"[" * 100_000):
        (sealed / "manifest.json").write_bytes(nonsense)
        assert manifest.read(sealed) is None
        assert manifest.problem(sealed) == "manifest.json is damaged"
    (sealed / "manifest.json").unlink()
    assert manifest.problem(sealed) == "unfinished (it has no manifest)"


def test_changed_byte_of_a_manifest_raises_nothing(sealed):
    """What says nothing of the files (a fact's value, the first byte of a name's escape) may change unseen."""
    good = (sealed / "manifest.json").read_bytes()
    start = good.index(b'"files"')
    for at in range(len(good)):
        for mask in (1, 2, 32):
            (sealed / "manifest.json").write_bytes(good[:at] + bytes([good[at] ^ mask]) + good[at + 1 :])
            fault = manifest.problem(sealed)
            if at > start and good[at : at + 1].isalnum():
                assert fault, good[max(0, at - 10) : at + 10]


def test_require_complete_error_has_fault_and_remedy(sealed):
    (sealed / "a.bin").write_bytes(b"")
    with pytest.raises(LabError) as error:
        manifest.require_complete(sealed, "toy", "Build it again")
    assert str(error.value) == f"toy {sealed} cannot be used: a.bin has 0 bytes, not 10. Build it again"


def test_amend_adds_fields_and_keeps_the_rest(sealed):
    before = manifest.read(sealed)
    manifest.amend(sealed, step=4, wer=0.25)
    assert manifest.read(sealed) == before | {"step": 4, "wer": 0.25}
    assert manifest.problem(sealed) is None


def test_write_json_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    manifest.write_json(path, {"å": 1})
    assert json.loads(path.read_text("utf-8")) == {"å": 1}
    assert os.listdir(tmp_path) == ["a.json"]
    with pytest.raises(TypeError):
        manifest.write_json(path, {"b": 2, "c": object()})
    assert json.loads(path.read_text("utf-8")) == {"å": 1}


@pytest.mark.parametrize("change", [lambda card: card.write_text("# Mine"), lambda card: card.unlink()])
def test_edited_or_removed_card_is_no_damage(tmp_path, change):
    (tmp_path / "README.md").write_text("# The lab's")
    (tmp_path / "a.bin").write_bytes(b"1")
    assert set(manifest.seal(tmp_path)["files"]) == {"README.md", "a.bin"}
    change(tmp_path / "README.md")
    assert manifest.problem(tmp_path) is None


def test_sealed_files_have_ordinary_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        for name, mode in (("weights", 0o600), ("tool", 0o700), ("open", 0o666)):
            (tmp_path / name).write_bytes(b"1")
            (tmp_path / name).chmod(mode)
        manifest.seal(tmp_path)
    finally:
        os.umask(before)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()}
    assert modes == {"weights": "0o640", "tool": "0o740", "open": "0o666", "manifest.json": "0o640"}


def test_two_writers_of_one_file_leave_one_content(tmp_path):
    path = tmp_path / "a.json"
    contents = [{"writer": number, "text": "x" * 10_000} for number in range(16)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda content: manifest.write_json(path, content), contents))
    assert json.loads(path.read_text("utf-8")) in contents
    assert os.listdir(tmp_path) == ["a.json"]


def test_failed_write_leaves_no_partial_file(tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        manifest.write_bytes(tmp_path / "a", b"1")
    assert os.listdir(tmp_path) == []
