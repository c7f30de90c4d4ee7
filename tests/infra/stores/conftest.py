"""Fixtures for the tests of stores."""

from __future__ import annotations

from pathlib import Path

import pytest
from servers.stores import Bench
from store_artefacts import create_artefact


@pytest.fixture(autouse=True)
def lab_cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "lab-cache"))
    return tmp_path / "lab-cache"


@pytest.fixture(params=["local", "drive", "hub", "hopsworks"])
def bench(request) -> Bench:
    return request.getfixturevalue(f"{request.param}_bench")


@pytest.fixture(params=["hub", "hopsworks"])
def served(request) -> Bench:
    """Return a store that is a server."""
    return request.getfixturevalue(f"{request.param}_bench")


@pytest.fixture
def artefact(tmp_path) -> Path:
    return create_artefact(tmp_path / "made" / "tour")
