"""Every command of the pages that wants a Ray cluster is run, on one that `ray start` starts as the page has it."""

from __future__ import annotations

import shutil
import tempfile

import matplotlib
import pages
import pytest
from conftest import RAY
from desk import Reader
from pages import Command

pytestmark = [pytest.mark.slow, pytest.mark.ray]
CLUSTER = pages.ROOT / "docs" / "cluster.md"


@pytest.fixture
def reader(desk):
    """One whose Ray keeps its files, its token too, in a folder of a short name: sockets lie in it."""
    pytest.importorskip("ray.train")
    desk.begin()
    folder = tempfile.mkdtemp(prefix="ray-")
    reader = Reader(desk)
    # the page says that nothing is reported; and 127.0.0.2 is the loopback, too, but an address to Ray
    own = ("RAY_USAGE_STATS_ENABLED", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
    reader.variables = {name: value for name, value in RAY.items() if name not in own}
    reader.variables["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"
    reader.variables |= {"RAY_TMPDIR": folder, "HOME": folder, "MPLCONFIGDIR": matplotlib.get_configdir()}
    yield reader
    reader.close()
    shutil.rmtree(folder, ignore_errors=True)


def test_every_command_for_a_cluster_runs(reader):
    commands = pages.commands(CLUSTER)
    elsewhere = [command for page in pages.PAGES if page != CLUSTER for command in pages.commands(page)]
    for command in commands + [command for command in elsewhere if pages.ON_A_CLUSTER.search(command.text)]:
        reader.run(command)
    assert reader.variables["RAY_USAGE_STATS_ENABLED"] == "0"
    stranger = Reader(reader.desk)
    stranger.variables = reader.variables | {"HOME": str(reader.desk.folder)}
    with pytest.raises(AssertionError, match="cannot be joined"):
        stranger.run(Command("python -m pipelines features --recipe tour --set source.seed=8 --cluster auto"))
