"""The store on a mounted drive."""

from __future__ import annotations

import errno

import pytest
from servers.stores import contents
from store_artefacts import FILES, error_line, fill_after, finished_folders

from pipelines.infra.errors import LabError
from pipelines.infra.stores import drive, local


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_drive_is_an_error_and_is_resumed(drive_bench, artefact, monkeypatch, number):
    fill_after(monkeypatch, 2, OSError(number, "No space left"))
    with pytest.raises(LabError) as caught:
        drive_bench.publish(artefact, "tour")
    error_line(caught, "the drive is full", "empty the bin", "what has arrived is kept")
    assert not drive_bench.exists("tour")
    assert drive_bench.uploads() == 2
    fill_after(monkeypatch, 99, OSError(number, "No space left"))
    drive_bench.publish(artefact, "tour")
    assert drive_bench.uploads() == len(FILES) + 1
    assert contents(drive_bench.fetch("tour")) == contents(artefact)


@pytest.mark.parametrize("number", [errno.ENOTCONN, errno.EIO, errno.ENOENT])
def test_unmounted_drive_is_a_one_line_error(drive_bench, artefact, tmp_path, monkeypatch, number):
    mount, aside = tmp_path / "mount" / "MyDrive", tmp_path / "unmounted"
    fill_after(monkeypatch, 2, OSError(number, "gone"), lambda: mount.rename(aside))
    with pytest.raises(LabError) as caught:
        drive_bench.publish(artefact, "tour")
    error_line(caught, "not mounted .any more.", "drive.mount", "what has arrived is kept")
    monkeypatch.undo()
    monkeypatch.setenv("LAB_DRIVE", str(tmp_path / "mount"))
    with pytest.raises(LabError, match="not mounted"):
        drive_bench.exists("tour")
    assert list((tmp_path / "mount").iterdir()) == []  # nothing is written where the drive would be
    aside.rename(mount)
    assert not drive_bench.exists("tour")
    drive_bench.publish(artefact, "tour")
    assert drive_bench.exists("tour")


def test_outdated_listing_is_read_again(drive_bench, artefact, monkeypatch):
    """For a while the mount neither lists a new file nor tells its size."""
    waited = []
    size = drive.DriveFolder._size
    monkeypatch.setattr(drive.time, "sleep", waited.append)
    monkeypatch.setattr(drive.DriveFolder, "_size", lambda self, name: None if len(waited) < 2 else size(self, name))
    with monkeypatch.context() as stale:
        stale.setattr(local.LocalFolder, "sizes", lambda self: {})
        drive_bench.publish(artefact, "tour")
    assert waited == [1, 2]
    assert contents(drive_bench.fetch("tour")) == contents(artefact)


def test_permanently_outdated_listing_is_an_error(drive_bench, artefact, monkeypatch):
    monkeypatch.setattr(drive.DriveFolder, "_size", lambda self, name: None)
    monkeypatch.setattr(local.LocalFolder, "sizes", lambda self: {})
    with pytest.raises(LabError) as caught:
        drive_bench.publish(artefact, "tour")
    error_line(caught, "does not read back", "Run this again")


def test_fetch_to_a_full_disk_is_a_one_line_error(drive_bench, artefact, monkeypatch):
    drive_bench.publish(artefact, "tour")
    fill_after(monkeypatch, 1, OSError(errno.ENOSPC, "No space left"))
    with pytest.raises(LabError, match="this machine's disk is full"):
        drive_bench.fetch("tour")
    assert finished_folders(drive_bench) == []
