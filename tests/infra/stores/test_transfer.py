"""Interrupted transfers."""

from __future__ import annotations

import shutil

import pytest
from log_recorder import record_log
from servers.stores import contents

from pipelines.infra.stores import local, transfer


def test_killed_fetch_is_resumed(tmp_path, artefact):
    place = local.LocalFolder(artefact)
    arrived = []

    class Killed(local.LocalFolder):
        def get(self, name, path):
            if len(arrived) == 3:
                raise KeyboardInterrupt
            arrived.append(name)
            super().get(name, path)

    with pytest.raises(KeyboardInterrupt):
        transfer.fetch(Killed(artefact), "x/tour", tmp_path / "into")
    assert not [path for path in (tmp_path / "into").iterdir() if not path.name.startswith(".")]
    told = record_log()
    home = transfer.fetch(place, "x/tour", tmp_path / "into")
    assert "fetching 3 of 6" in told[0]
    assert contents(home) == contents(artefact)
    shutil.rmtree(home)
