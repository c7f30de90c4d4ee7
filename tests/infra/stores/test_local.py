"""The store of local folders, and which URI selects which store."""

from __future__ import annotations

import errno
import re

import pytest
from store_artefacts import error_line, fill_after

from pipelines.infra import stores
from pipelines.infra.errors import LabError
from pipelines.infra.stores import drive, hopsworks, hub, local


@pytest.mark.parametrize(
    ("uri", "store"),
    [
        ("runs/features/tour-1", local.LocalStore),
        ("~/caches/x", local.LocalStore),
        ("/content/drive/MyDrive/x", drive.DriveStore),
        ("/content/drives/x", local.LocalStore),
        ("hub://me/cache@main", hub.HubStore),
        ("hopsworks://demo/Resources/x", hopsworks.HopsworksStore),
    ],
)
def test_uri_prefix_selects_the_store(uri, store):
    assert type(stores.open_store(uri)) is store


@pytest.mark.parametrize("uri", ["s3://bucket/x", "gs://x", "https://huggingface.co/me/x"])
def test_unknown_uri_prefix_is_a_one_line_error(uri):
    with pytest.raises(LabError, match=f"no store for {re.escape(uri)}: expected a folder, hub://"):
        stores.open_store(uri)


def test_local_folder_of_a_path_is_the_path(artefact):
    assert stores.local_folder(str(artefact)) == artefact


def test_full_disk_is_a_one_line_error(local_bench, artefact, monkeypatch):
    fill_after(monkeypatch, 2, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(LabError) as caught:
        local_bench.publish(artefact, "tour")
    error_line(caught, "not finished: No space left")
    assert not local_bench.exists("tour")
