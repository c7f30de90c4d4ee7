"""The host, the device and the Hub, with loopback servers and environment variables as stand-ins."""

from __future__ import annotations

import ast
import contextlib
import errno
import http.server
import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from log_recorder import record_log
from servers.loopback import free_port

from pipelines.inference.http.guard import Refusal
from pipelines.infra import console, environment
from pipelines.infra.errors import MAX_CHARACTERS, MAX_WORD, LabError, Unfinished, shortened

PLACES = ("COLAB_RELEASE_TAG", "COLAB_GPU", "KAGGLE_KERNEL_RUN_TYPE", "SPACE_ID")
SITTINGS = ("JPY_SESSION_NAME", "VSCODE_PID")


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch):
    """A machine that sets none of the variables, and a process that has not asked for the Hub yet."""
    for name in (*PLACES, *SITTINGS, "LAB_RUNS", "LAB_CACHE", "XDG_CACHE_HOME", "HF_HUB_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("no_proxy", "*")
    environment.hub_reachable.cache_clear()
    yield
    environment.hub_reachable.cache_clear()


# --- does the Hub answer? ---------------------------------------------------------------------------------------------


class Hub:
    """A server on loopback that answers every request with one status, and counts them."""

    def __init__(self, status: int):
        hub, self.asked = self, []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                hub.asked.append(self.path)
                self.send_response(status)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"[]")

            def log_message(self, *_arguments):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def hub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """A Hub that answers with `request.param`, 200 if there is none; HF_ENDPOINT leads to it."""
    made = Hub(getattr(request, "param", 200))
    monkeypatch.setenv("HF_ENDPOINT", made.address)
    yield made
    made.close()


def is_reachable_in_time(limit_s: float = environment.HUB_TIMEOUT_S) -> bool:
    """The answer, after checking that it came within the limit (and half a second for a busy machine)."""
    started = time.monotonic()
    answer = environment.hub_reachable(limit_s)
    assert time.monotonic() - started < limit_s + 0.5
    return answer


@pytest.mark.parametrize("hub", [200, 401, 403, 404, 429], indirect=True)
def test_hub_that_refuses_is_reachable(hub: Hub):
    assert is_reachable_in_time() is True
    assert len(hub.asked) == 1


@pytest.mark.parametrize("hub", [407, 500, 502, 503], indirect=True)
def test_failing_server_or_proxy_is_not_reachable(hub: Hub):
    assert is_reachable_in_time() is False
    assert len(hub.asked) == 1


def test_closed_port_is_unreachable_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    started = time.monotonic()
    assert environment.hub_reachable() is False
    assert time.monotonic() - started < 1


def test_silent_hub_is_unreachable_after_three_seconds(monkeypatch: pytest.MonkeyPatch):
    assert environment.HUB_TIMEOUT_S <= 3
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the kernel connects, nobody ever answers
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert is_reachable_in_time() is False


def test_slow_response_is_unreachable_in_time(monkeypatch: pytest.MonkeyPatch):
    """Each byte comes before the socket's own time-out, so only the clock outside can end it."""

    def drip(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            with contextlib.suppress(OSError):  # whoever asked has gone
                for byte in b"HTTP/1.1 200 OK\r\nX-Slow: " + b"a" * 20:
                    connection.send(bytes([byte]))
                    time.sleep(0.05)

    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        threading.Thread(target=drip, args=(server,), daemon=True).start()
        assert is_reachable_in_time(0.5) is False


def test_hanging_dns_is_unreachable_in_time(monkeypatch: pytest.MonkeyPatch):
    released = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_arguments, **_options: released.wait(10) and [])
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    assert is_reachable_in_time(0.3) is False
    released.set()


@pytest.mark.parametrize("endpoint", ["not an address", "http://", "ftp://hub.invalid", "http://[broken"])
def test_invalid_endpoint_is_unreachable(monkeypatch: pytest.MonkeyPatch, endpoint: str):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert is_reachable_in_time(1.0) is False


@pytest.mark.parametrize("value", ["1", "true", "YES", "on"])
def test_offline_is_unreachable_without_a_request(hub: Hub, monkeypatch: pytest.MonkeyPatch, value: str):
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert environment.hub_reachable() is False
    assert hub.asked == []


@pytest.mark.parametrize("value", ["", "0", "false"])
def test_other_values_of_offline_send_a_request(hub: Hub, monkeypatch: pytest.MonkeyPatch, value: str):
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert environment.hub_reachable() is True


def test_hub_is_requested_once_per_process(hub: Hub):
    assert [environment.hub_reachable() for _ in range(3)] == [True, True, True]
    assert len(hub.asked) == 1


def test_endpoint_and_host_of_the_hub(monkeypatch: pytest.MonkeyPatch):
    assert (environment.hub_endpoint(), environment.hub_host()) == ("https://huggingface.co", "huggingface.co")
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.example:8080/")
    assert (environment.hub_endpoint(), environment.hub_host()) == ("http://mirror.example:8080", "mirror.example")


# --- which machine? ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "host"),
    [
        ({}, "local"),
        ({"COLAB_RELEASE_TAG": "release-colab_20260801"}, "colab"),
        ({"COLAB_GPU": "0"}, "colab"),
        ({"KAGGLE_KERNEL_RUN_TYPE": "Interactive"}, "kaggle"),
        ({"SPACE_ID": "owner/space"}, "space"),
    ],
)
def test_host_follows_environment_variables(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], host: str):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert environment.host() == host
    assert environment.detect().host == host


def test_detected_device_exists_in_torch():
    import torch

    here = environment.detect()
    assert (here.device == "cuda") == torch.cuda.is_available()
    assert here.device != "cpu" or here.dtype == "float32"
    torch.zeros(1, device=here.device)
    assert here.as_dict().keys() == {"host", "device", "dtype", "device_name"}


@pytest.mark.parametrize(
    ("variable", "interactive"),
    [
        ("", False),
        ("COLAB_GPU=1", True),
        ("JPY_SESSION_NAME=1", True),
        ("VSCODE_PID=1", True),
        ("SPACE_ID=1", False),
        ("KAGGLE_KERNEL_RUN_TYPE=Interactive", True),
        ("KAGGLE_KERNEL_RUN_TYPE=Batch", False),
    ],
)
def test_interactive_follows_environment_variables(monkeypatch: pytest.MonkeyPatch, variable: str, interactive: bool):
    if variable:
        monkeypatch.setenv(*variable.split("="))
    assert environment.interactive() is interactive


def test_printed_line_is_bounded_and_keeps_its_end(capsys):
    assert shortened("a b " * 1_000, 4_000) == "a b " * 1_000
    console.configure()
    console.LOGGER.info("columns " + "c, " * 100_000 + "Name it with --audio-column")
    line = capsys.readouterr().out
    assert len(line) < 4_100 and line.startswith("columns c, ") and line.endswith("--audio-column\n")
    assert "(300,035 characters)" in line


def test_errors_and_refusals_quote_long_texts_in_part():
    address = "http://" + "a" * 9_000
    text = f"{address}: no file is there. Name another"
    for line in (str(LabError(text)), Refusal(400, text).detail):
        assert len(line) < 500 and line.startswith("http://aaa") and line.endswith("Name another")
        assert "(9,008 characters)" in line
    assert len(str(LabError(f"names are short, got {'a b ' * 5_000!r}"))) == MAX_CHARACTERS
    assert str(LabError("x" * MAX_WORD)) == "x" * MAX_WORD


def test_lab_errors_in_notebooks_are_one_line(monkeypatch: pytest.MonkeyPatch):
    import IPython

    sent, handlers = [], {}
    shell = SimpleNamespace(_showtraceback=lambda *error: sent.append(error))
    shell.set_custom_exc = lambda kinds, show: handlers.update(dict.fromkeys(kinds, show))
    console.show_errors_in_one_line(environment.describe_disk_error)
    assert handlers == {}, "outside of a notebook nothing is set"
    monkeypatch.setattr(IPython, "get_ipython", lambda: shell)
    environment.prepare()
    error = Unfinished("stopped at step 3")
    handlers[Exception](shell, Unfinished, error, None, tb_offset=1)
    assert sent == [(Unfinished, error, ["Unfinished: stopped at step 3"])]
    full = OSError(errno.ENOSPC, "No space left on device", "x.bin")
    handlers[Exception](shell, OSError, full, None)
    assert sent[1][2] == ["OSError: the disk is full (x.bin). Free some space, then run the same again to continue"]
    shell.showtraceback = lambda error, tb_offset: sent.append(error)
    handlers[Exception](shell, ValueError, ValueError("a bug"), None)
    assert sent[2][0] is ValueError, "other errors keep their traceback"


def test_kaggle_secrets_become_variables_without_replacing_any(monkeypatch: pytest.MonkeyPatch):
    secrets = {"HF_TOKEN": "hf_from_kaggle", "MDC_API_KEY": "from_kaggle"}
    client = SimpleNamespace(get_secret=secrets.__getitem__)
    monkeypatch.setitem(sys.modules, "kaggle_secrets", SimpleNamespace(UserSecretsClient=lambda: client))
    for name in environment.SECRETS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MDC_API_KEY", "mine")
    environment.prepare()
    assert "HF_TOKEN" not in os.environ, "only on Kaggle"
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    environment.prepare()
    assert [os.environ.get(name) for name in environment.SECRETS] == ["hf_from_kaggle", "mine", None]
    del os.environ["HF_TOKEN"]


# --- prepare ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """jiwer is there, and two packages are not."""
    light = {"jiwer": "jiwer>=4,<5", "not_there": "not-there>=1", "nor_this": "nor-this>=2"}
    monkeypatch.setattr(environment, "_NOTEBOOK_PACKAGES", light)


class Pip:
    """Record the arguments of pip instead of running it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, returncode: int = 0, stderr: str = ""):
        self.commands: list[list[str]] = []
        self.pins: list[str] = []
        self.done = SimpleNamespace(returncode=returncode, stdout="", stderr=stderr)
        monkeypatch.setattr(environment.subprocess, "run", self.run)

    def run(self, command: list[str], **_options) -> SimpleNamespace:
        self.commands.append(command)
        self.pins += Path(command[command.index("-c") + 1]).read_text().splitlines()
        return self.done


def test_prepare_installs_nothing_if_nothing_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLAB_RELEASE_TAG", "1")
    pip, lines = Pip(monkeypatch), []
    record_log(lines)
    here = environment.prepare("elsewhere")
    assert pip.commands == []
    assert here.host == "colab"
    assert str(Path("elsewhere").absolute()) in lines[-1]


@pytest.mark.parametrize("place", [None, "SPACE_ID"])
def test_prepare_on_a_local_machine_names_the_command(
    monkeypatch: pytest.MonkeyPatch, missing_package: None, place: str | None
):
    if place:
        monkeypatch.setenv(place, "1")
    pip = Pip(monkeypatch)
    with pytest.raises(
        LabError, match=r"lacks not-there>=1, nor-this>=2\. Run: pip install -r requirements.txt"
    ) as caught:
        environment.prepare()
    assert "\n" not in str(caught.value)
    assert pip.commands == []


@pytest.mark.parametrize("place", ["COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE"])
def test_prepare_installs_missing_and_pins_installed_packages(
    monkeypatch: pytest.MonkeyPatch, missing_package: None, place: str
):
    monkeypatch.setenv(place, "1")
    pip, lines = Pip(monkeypatch), []
    record_log(lines)
    environment.prepare()
    (command,) = pip.commands
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    assert command[command.index("-c") + 2 :] == ["not-there>=1", "nor-this>=2"]
    for name in ("torch", "numpy", "pandas"):
        assert f"{name}=={importlib.metadata.version(name)}" in pip.pins, "pip must not replace it"
    assert "installing not-there>=1, nor-this>=2" in lines[0]


def test_imported_one_of_two_versions_is_pinned(monkeypatch: pytest.MonkeyPatch):
    found = [SimpleNamespace(name="py_thing", version="2"), SimpleNamespace(name="Py-Thing", version="1")]
    monkeypatch.setattr(environment.importlib.metadata, "distributions", lambda: found)
    pip = Pip(monkeypatch)
    environment._pip_install(["not-there"])
    assert pip.pins == ["py_thing==2"]


def test_prepare_reports_the_error_of_pip(monkeypatch: pytest.MonkeyPatch, missing_package: None):
    monkeypatch.setenv("COLAB_RELEASE_TAG", "1")
    Pip(monkeypatch, 1, "WARNING: something\nERROR: no matching distribution found for not-there>=1\n")
    with pytest.raises(LabError, match=r"no matching distribution.*Run: pip install not-there>=1") as caught:
        environment.prepare()
    assert "\n" not in str(caught.value)


def test_torch_is_no_notebook_package():
    assert not {"torch", "torchaudio", "numpy"} & environment._NOTEBOOK_PACKAGES.keys()
    required = (environment.ROOT / "requirements.txt").read_text()
    for wanted in environment._NOTEBOOK_PACKAGES.values():
        assert f"\n{wanted}\n" in required, "the notebooks ask for what requirements.txt asks for"


def test_notebook_packages_cover_all_imports():
    root = environment.ROOT
    sources = [*root.glob("pipelines/**/*.py"), root / "app.py"]
    nodes = [node for path in sources for node in ast.walk(ast.parse(path.read_text("utf-8")))]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    ours, with_pydantic = {"pipelines", "app"}, {"pydantic_core"}
    others = {name.partition(".")[0] for name in names} - sys.stdlib_module_names - ours - with_pydantic
    with_transformers = {"torch", "numpy", "tqdm", "safetensors", "huggingface_hub", "tokenizers", "fsspec", "psutil"}
    of_the_kernel, of_colab, of_a_space, of_commands, extras = (
        {"IPython", "ipywidgets"},
        {"google", "kaggle_secrets"},
        {"spaces"},
        {
            "anyio",
            "python_multipart",
            "h11",
            "fastapi",
            "starlette",
            "uvicorn",
            "typer",
            "papermill",
            "mistune",
            "datasets",
            "evaluate",
        },  # the last two: metric.py, for other people's code
        {
            "onnx",
            "openpyxl",
            "yt_dlp",
            "hopsworks",
            "hopsworks_common",
            "datacollective",
            "requests",
            "ray",
            "peft",
            "ctranslate2",
            "pywhispercpp",
            "_pywhispercpp",
            "bitsandbytes",
            "optuna",
        },
    )
    elsewhere = of_the_kernel | of_colab | of_a_space | of_commands | extras
    read_only = {"silero_vad"}  # its model is read without importing it
    assert others - with_transformers - elsewhere == environment._NOTEBOOK_PACKAGES.keys() - read_only


@pytest.mark.slow
def test_pins_are_valid_constraints_of_pip(monkeypatch: pytest.MonkeyPatch):
    """The real pip reads the pins, and finds that what is installed already satisfies them."""
    run = subprocess.run
    monkeypatch.setattr(
        environment.subprocess,
        "run",
        lambda command, **options: run([*command, "--no-index", "--dry-run"], **options),
    )
    environment._pip_install(["accelerate>=1.10", "pandas>=2.2"])  # accelerate needs torch: it must stay


@pytest.mark.parametrize(
    ("places", "mounted"),
    [
        (("/content/drive/MyDrive/lab",), ["/content/drive"]),
        (("", "hub://me/cache", "/content/drive/MyDrive/run"), ["/content/drive"]),
        (("runs", "hub://me/cache"), []),
    ],
)
def test_prepare_mounts_drive_if_a_path_is_on_it(monkeypatch: pytest.MonkeyPatch, places: tuple, mounted: list):
    mounts: list[str] = []
    monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace(drive=SimpleNamespace(mount=mounts.append)))
    monkeypatch.setenv("COLAB_RELEASE_TAG", "1")
    environment.prepare(*places)
    assert mounts == mounted


# --- folders ----------------------------------------------------------------------------------------------------------


def test_runs_folder_order_is_name_lab_runs_project(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert environment.runs_folder() == environment.ROOT / "runs"
    monkeypatch.setenv("LAB_RUNS", str(tmp_path / "by variable"))
    assert environment.runs_folder() == tmp_path / "by variable"
    assert environment.runs_folder(tmp_path / "named") == tmp_path / "named"
    assert environment.runs_folder("~/lab") == Path.home() / "lab"
    monkeypatch.chdir(tmp_path)
    assert environment.runs_folder("here") == tmp_path / "here"
    monkeypatch.setenv("LAB_RUNS", "")
    assert environment.runs_folder() == environment.ROOT / "runs"


def test_cache_folder_is_lab_cache_or_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert environment.cache_folder() == Path.home() / ".cache" / "swedish-whisper-lab"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert environment.cache_folder() == tmp_path / "swedish-whisper-lab"
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "lab"))
    assert environment.cache_folder() == tmp_path / "lab"
    monkeypatch.setenv("LAB_CACHE", "~/lab")
    assert environment.cache_folder() == Path.home() / "lab"


def test_free_port_can_be_listened_on():
    with socket.create_server(("127.0.0.1", free_port())) as server:
        assert server.getsockname()[1] > 0


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_freed_memory_is_used_again_without_new_pages():
    resource = pytest.importorskip("resource")

    def new_pages(n_bytes: int) -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        assert len(b"x" * n_bytes) == n_bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    environment.keep_freed_memory()
    new_pages(64 << 20)
    assert new_pages(64 << 20) < 100, "the system clears 16,384 pages for memory that was given back"


def test_share_cores_keeps_what_the_user_set(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setenv("GOMP_SPINCOUNT", "")  # so that the variable is put back
    monkeypatch.delenv("GOMP_SPINCOUNT")
    environment.share_cores()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    assert 0 < int(os.environ["GOMP_SPINCOUNT"]) < 10_000
