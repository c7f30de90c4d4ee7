"""Import, options and launch of the app."""

import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.inference.app import launch
from pipelines.inference.app.launch import build
from pipelines.infra.errors import LabError
from tests.inference.app.app_fakes import (
    FakeTranscriber,
)

gr = pytest.importorskip("gradio")
ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
def test_import_is_fast_and_loads_nothing_heavy():
    code = (
        "import time; start = time.process_time(); import app, sys, json; seconds = time.process_time() - start\n"
        "heavy = ['gradio', 'torch', 'transformers', 'pandas', 'huggingface_hub', 'httpx']\n"
        "print(json.dumps([seconds, [name for name in heavy if name in sys.modules]]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, loaded = json.loads(done.stdout)
    assert loaded == []
    assert seconds < 1.0


def run_app(*arguments, env=None):
    return subprocess.run([sys.executable, "app.py", *arguments], cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_dry_run_prints_the_model_and_loads_nothing(tmp_path):
    environ = {**os.environ, "LAB_RUNS": str(tmp_path), "MODEL_URI": "hub://me/mine"}
    done = run_app("--dry-run", env=environ)
    first, last = done.stdout.splitlines()
    assert done.returncode == 0
    assert first.startswith("model: hub://me/mine (")
    assert last.startswith("next: ")


def test_log_option_precedes_the_environment(monkeypatch):
    monkeypatch.setenv("LAB_LOG", "/data/log.csv")
    assert launch.parse_options([]).log == Path("/data/log.csv")
    assert launch.parse_options(["--log", "other.csv"]).log == Path("other.csv")
    monkeypatch.delenv("LAB_LOG")
    assert launch.parse_options([]).log == ROOT / "log.csv"


def test_full_disk_is_one_line(monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/x.bin")

    monkeypatch.setattr(launch, "_serve", fail)
    with pytest.raises(
        SystemExit, match=r"^error: the disk is full \(/data/x.bin\). Free some space, then run the same"
    ):
        launch.main(["--model", "any/model"])


@pytest.mark.slow
def test_missing_model_is_one_line(tmp_path):
    done = run_app("--model", str(tmp_path))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: no model in ")


def test_page_has_one_endpoint_limits_and_no_analytics(tmp_path):
    demo = build(FakeTranscriber(tmp_path), tmp_path / "log.csv")
    public = {fn.api_name for fn in demo.fns.values() if fn.api_visibility == "public"}
    assert public == {"transcribe"}
    (called,) = [fn for fn in demo.fns.values() if fn.api_name == "transcribe"]
    assert [type(block).__name__ for block in called.inputs if type(block).__name__ != "State"] == ["Audio"]
    assert demo.analytics_enabled is False
    assert demo.delete_cache == (60, 1_800)
    assert (demo._queue.max_size, demo._queue.default_concurrency_limit) == (20, 1)
    assert str(tmp_path) not in json.dumps(demo.get_config_file(), default=str)


@pytest.mark.parametrize("error", [None, LabError("the engine has no hotwords")])
def test_hotwords_are_offered_if_the_engine_has_them(tmp_path, monkeypatch, error):
    def with_options(self, **changes):
        if error:
            raise error

    monkeypatch.setattr(FakeTranscriber, "with_options", with_options)
    demo = build(FakeTranscriber(tmp_path), tmp_path / "log.csv")
    blocks = {block.elem_id: block for block in demo.blocks.values()}
    assert blocks["hotwords"].visible == (error is None) and blocks["prompt"].visible
    assert not blocks["options"].open


def test_taken_port_is_one_line(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(LabError, match="--port"):
            launch.launch(build(FakeTranscriber(tmp_path), tmp_path / "log.csv"), port=taken.getsockname()[1])


@pytest.mark.parametrize(
    ("arguments", "environ", "limits", "n_proxies"),
    [
        ([], {}, (0, 0), 0),
        (["--host", "localhost"], {}, (0, 0), 0),
        (["--host", "0.0.0.0"], {}, (60, 600), 0),
        (["--share"], {}, (0, 0), 0),
        ([], {"SPACE_ID": "me/page"}, (60, 600), 6),
        ([], {"LAB_REQUESTS_PER_MINUTE": "5", "LAB_TRUSTED_PROXIES": "10.0.0.1"}, (5, 0), 1),
        (["--requests-per-minute", "0", "--trusted-proxy", "::1"], {"SPACE_ID": "me/page"}, (0, 600), 1),
    ],
)
def test_limits_apply_where_other_machines_can_come_from(monkeypatch, arguments, environ, limits, n_proxies):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    limiter, proxies = launch.limits_of(launch.parse_options(arguments))
    assert (limiter.requests_per_minute, limiter.audio_s_per_minute) == limits
    assert len(proxies) == n_proxies


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "x"])
def test_limit_that_is_no_number_is_refused(value, capsys):
    with pytest.raises(SystemExit):
        launch.parse_options(["--requests-per-minute", value])
    assert "--requests-per-minute" in capsys.readouterr().err.splitlines()[-1]
