from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.infra.parallel import work_folder

ROOT = Path(__file__).parents[3]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_folder_is_removed_at_the_end_and_after_an_error(tmp_path):
    with work_folder.create(tmp_path, "export") as folder:
        (folder / "weights").write_bytes(b"1")
        assert folder.name.startswith(".export-")
    with pytest.raises(ZeroDivisionError), work_folder.create(tmp_path, "export"):
        raise ZeroDivisionError
    assert names(tmp_path) == []


def test_folder_of_a_running_process_stays(tmp_path):
    with work_folder.create(tmp_path, "export") as one, work_folder.create(tmp_path, "export") as other:
        assert one.is_dir() and other.is_dir() and one != other


def test_folder_without_a_lock_is_removed_after_a_day(tmp_path):
    old, new, other = (tmp_path / name for name in (".export-old", ".export-new", ".production-old"))
    for folder in (old, new, other):
        folder.mkdir()
    for folder in (old, other):
        os.utime(folder, (0, 0))
    with work_folder.create(tmp_path, "export"):
        pass
    assert names(tmp_path) == [".export-new", ".production-old"]


@pytest.mark.slow
def test_folder_of_a_killed_process_is_removed_by_the_next(tmp_path):
    code = (
        "import os, pathlib, sys; from pipelines.infra.parallel import work_folder\n"
        "with work_folder.create(pathlib.Path(sys.argv[1]), 'export') as folder:\n"
        "    (folder / 'weights').write_bytes(b'1'); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=False)
    assert len(names(tmp_path)) == 2  # the folder and its lock
    with work_folder.create(tmp_path, "export"):
        pass
    assert names(tmp_path) == []
