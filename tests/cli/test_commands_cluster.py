"""Run the documented commands that need a Ray cluster, on a cluster started by the commands of the page."""

from __future__ import annotations

import shutil
import tempfile

import matplotlib
import pages
import pytest
from command_runner import CommandRunner
from conftest import RAY
from pages import Command

pytestmark = [pytest.mark.slow, pytest.mark.ray]
CLUSTER = pages.ROOT / "docs" / "cluster.md"


@pytest.fixture
def runner(lab_copy):
    """Return a runner whose Ray keeps its files and its token in a folder with a short path: it holds sockets."""
    pytest.importorskip("ray.train")
    lab_copy.reset()
    folder = tempfile.mkdtemp(prefix="ray-")
    runner = CommandRunner(lab_copy)
    # the page itself turns off usage reports; 127.0.0.2 is loopback too, but counts as another address for Ray
    page_sets = ("RAY_USAGE_STATS_ENABLED", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
    runner.variables = {name: value for name, value in RAY.items() if name not in page_sets}
    runner.variables["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"
    runner.variables |= {"RAY_TMPDIR": folder, "HOME": folder, "MPLCONFIGDIR": matplotlib.get_configdir()}
    yield runner
    runner.close()
    shutil.rmtree(folder, ignore_errors=True)


def test_cluster_commands_run_and_refuse_strangers(runner):
    commands = pages.commands(CLUSTER)
    others = [command for page in pages.PAGES if page != CLUSTER for command in pages.commands(page)]
    for command in commands + [command for command in others if pages.ON_A_CLUSTER.search(command.text)]:
        runner.run(command)
    assert runner.variables["RAY_USAGE_STATS_ENABLED"] == "0"
    stranger = CommandRunner(runner.lab)
    stranger.variables = runner.variables | {"HOME": str(runner.lab.folder)}
    with pytest.raises(AssertionError, match="cannot be joined"):
        stranger.run(Command("python -m pipelines features --recipe tour --set source.seed=8 --cluster auto"))
