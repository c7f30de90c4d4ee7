"""Create artefacts for the tests of stores, and check their errors."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from pathlib import Path

from servers.stores import Bench

from pipelines.infra import manifest
from pipelines.infra.stores import local

FILES = {
    "shard-00000.bin": bytes(range(256)) * 40,
    "shard-00001.bin": b"\r\n--x\0" * 1500,
    "shard-00000.json": b'{"rows": []}',
    "rejected.csv": b"id,split,reason,detail\n",
    "notes/deep.bin": b"d" * 3000,
    "empty.txt": b"",
}


def create_artefact(folder: Path, files: dict[str, bytes] = FILES, **fields) -> Path:
    """Write files and seal them as a cache; return the folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    manifest.seal(folder, **{"kind": "cache", "digest": "d1", **fields})
    return folder


def error_line(caught, *words: str) -> str:
    """Return the message of a caught LabError; assert that it is one line, matches `words` and hides its cause."""
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.__cause__ is None and (caught.value.__suppress_context__ or caught.value.__context__ is None)
    for word in words:
        assert re.search(word, message), message
    return message


def finished_folders(bench: Bench) -> list[Path]:
    """Return the folders in the lab's cache that have a manifest."""
    return [path.parent for path in Path(os.environ["LAB_CACHE"]).rglob("manifest.json") if ".partial" not in str(path)]


def fill_after(monkeypatch, n: int, error: OSError, then: Callable[[], None] = lambda: None) -> None:
    """Let copies after the first `n` write half a file, call `then` and raise `error`."""
    copied = []

    def copyfile(source, target):
        copied.append(target)
        if len(copied) > n:
            then()
            with contextlib.suppress(OSError):
                Path(target).write_bytes(Path(source).read_bytes()[:100])
            raise error
        Path(target).write_bytes(Path(source).read_bytes())

    monkeypatch.setattr(local.shutil, "copyfile", copyfile)
