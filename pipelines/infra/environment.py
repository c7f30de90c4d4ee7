"""The machine: its host (Colab, Kaggle, a Space or local), its device, and whether the Hub is reachable.

Nothing is computed at import.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import importlib.util
import logging
import os
import platform
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path

from pipelines.infra import console
from pipelines.infra.errors import LabError, is_disk_full

logger = logging.getLogger(__name__)

HUB_TIMEOUT_S = 3.0
ROOT = Path(__file__).resolve().parents[2]
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Options of mallopt, from glibc's malloc.h."""
_KEPT_BYTES = 1 << 30
_SPINS = "1000"
"""How often a waiting thread of GNU OpenMP looks before it sleeps: some ten microseconds."""
SECRETS = ("HF_TOKEN", "MDC_API_KEY", "HOPSWORKS_API_KEY")
"""Variables with tokens of stores and sources."""
_NOTEBOOK_PACKAGES = {
    "espeakng_loader": "espeakng-loader>=0.2.4",
    "jiwer": "jiwer>=4,<5",
    "soxr": "soxr>=0.5",
    "soundfile": "soundfile>=0.12.1",
    "silero_vad": "silero-vad>=6.2.2",
    "onnxruntime": "onnxruntime>=1.20",
    "transformers": "transformers>=5.15,<6",
    "accelerate": "accelerate>=1.10",
    "pydantic": "pydantic>=2.7",
    "filelock": "filelock>=3.12",
    "matplotlib": "matplotlib>=3.8",
    "pandas": "pandas>=2.2",
    "pyarrow": "pyarrow>=18",
    "gradio": "gradio>=6.20,<7",
    "jinja2": "jinja2>=3.1",
}
"""Module to requirement: the packages that the notebooks need besides torch."""


@dataclass(frozen=True)
class Environment:
    """The machine that a stage runs on."""

    host: str
    """colab, kaggle, space or local."""
    device: str
    """cuda, mps or cpu."""
    dtype: str
    """The fastest training precision of the device: bfloat16, float16 or float32."""
    device_name: str
    """Name of the GPU, or number of CPU threads."""

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def detect() -> Environment:
    """Return this machine's environment. Imports torch (about 1 s)."""
    import torch

    if torch.cuda.is_available():
        dtype = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
        return Environment(host(), "cuda", dtype, torch.cuda.get_device_name())
    if torch.backends.mps.is_available():
        return Environment(host(), "mps", "float32", "Apple GPU")
    return Environment(host(), "cpu", "float32", f"{torch.get_num_threads()} CPU threads")


def share_cores() -> None:
    """Let OpenMP threads that wait for others sleep after some microseconds. Call it before torch is imported.

    Threads that spin for long make a training step on two cores 4 to 6 times slower if another program runs, such as a
    browser (measured: 0.9 s sleeping, 1 to 9 s spinning). Threads that sleep at once lose time too: a step has
    thousands of short waits, and a busy system wakes a thread late. Beside three other trainings, five steps took 22
    and 30 s with this number of spins, and more than 150 s with none, three times. Results do not depend on it.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next tensors, instead of returning it to the system each time.

    New pages have to be cleared: that takes a tenth to a fifth of a training step on a CPU. Results stay the same, to
    the bit. The process holds its peak of memory until it ends, so servers do not call this. It needs glibc.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            libc.mallopt(option, _KEPT_BYTES)


def host() -> str:
    """Return colab, kaggle, space or local, from the environment variables that these hosts set."""
    if "COLAB_RELEASE_TAG" in os.environ or "COLAB_GPU" in os.environ:
        return "colab"
    if "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
        return "kaggle"
    return "space" if "SPACE_ID" in os.environ else "local"


def interactive() -> bool:
    """Return True in Colab, Jupyter, an editor or an open Kaggle notebook, False in papermill and scripts."""
    return (
        host() == "colab"
        or (host() == "kaggle" and os.environ["KAGGLE_KERNEL_RUN_TYPE"] == "Interactive")
        or "JPY_SESSION_NAME" in os.environ
        or "VSCODE_PID" in os.environ
    )


def runs_folder(named: str | Path = "") -> Path:
    """Return the folder for artefacts: `named`, else LAB_RUNS, else `runs/` beside the package."""
    return Path(named or os.environ.get("LAB_RUNS") or ROOT / "runs").expanduser().absolute()


def describe_disk_error(error: BaseException) -> str:
    """Return one line for an error of the disk: it is full, or a path on it cannot be used; "" for any other error."""
    named = getattr(error, "filename", None)
    if is_disk_full(error, runs_folder(), cache_folder(), Path(tempfile.gettempdir()), Path.cwd()):
        where = f" ({named})" if named else ""
        return f"the disk is full{where}. Free some space, then run the same again to continue"
    if isinstance(error, OSError) and named:
        return f"{named}: {error.strerror}. Name another path, or free space there"
    return ""


def prepare(runs: str | Path = "", *uris: str) -> Environment:
    """Prepare the machine for a notebook: install missing packages, and mount Drive if a path is on it.

    Packages are installed only on Colab and Kaggle; elsewhere a missing one raises LabError with the command. Installed
    packages, above all torch, numpy and pandas, are pinned: none is replaced in a running kernel.
    """
    share_cores()
    console.configure()
    console.show_errors_in_one_line(describe_disk_error)
    _read_kaggle_secrets()
    _show_whole_cells()
    missing = [
        requirement for module, requirement in _NOTEBOOK_PACKAGES.items() if importlib.util.find_spec(module) is None
    ]
    if missing and host() not in ("colab", "kaggle"):
        raise LabError(f"this kernel lacks {', '.join(missing)}. Run: pip install -r requirements.txt")
    if missing:
        logger.info(f"installing {', '.join(missing)} ...")
        _pip_install(missing)
    if host() == "colab" and any(str(path).startswith("/content/drive") for path in (runs, *uris)):
        from google.colab import drive  # exists only on Colab

        drive.mount("/content/drive")
    machine = detect()
    logger.info(
        f"{machine.host}: {machine.device_name}, training in {machine.dtype}; artefacts go to {runs_folder(runs)}"
    )
    return machine


def _show_whole_cells() -> None:
    """Have long cells of tables wrapped: pandas cuts them after 50 characters."""
    with contextlib.suppress(ImportError):  # it is installed below
        import pandas

        pandas.set_option("display.max_colwidth", None)


def _read_kaggle_secrets() -> None:
    """Set the variables of SECRETS from the secrets that are attached to a Kaggle notebook."""
    if host() != "kaggle":
        return
    for name in SECRETS:
        if name not in os.environ:
            with contextlib.suppress(Exception):  # Kaggle raises different exceptions for no secret and no permission
                from kaggle_secrets import UserSecretsClient  # exists only on Kaggle

                os.environ[name] = UserSecretsClient().get_secret(name)


def _pip_install(requirements: list[str]) -> None:
    """Install packages without changing installed ones: each of these is pinned by a constraint."""
    installed: dict[str, str] = {}
    for item in importlib.metadata.distributions():  # duplicates: the first one is imported
        installed.setdefault(item.name.lower().replace("_", "-"), f"{item.name}=={item.version}")
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as pins:
        pins.write("\n".join(sorted(installed.values())))
        pins.flush()
        done = subprocess.run(
            [sys.executable, "-m", "pip", "install", "-q", "-c", pins.name, *requirements],
            capture_output=True,
            text=True,
        )
    if done.returncode:
        reason = (done.stderr.strip() or "pip failed").splitlines()[-1]
        raise LabError(
            f"could not install {' '.join(requirements)}: {reason}. Run: pip install {' '.join(requirements)}"
        )
    importlib.invalidate_caches()


def cache_folder() -> Path:
    """Return the folder for downloads that all runs share: LAB_CACHE, else one in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("LAB_CACHE") or Path(base) / "swedish-whisper-lab").expanduser().absolute()


@functools.cache
def hub_reachable(timeout_s: float = HUB_TIMEOUT_S) -> bool:
    """Return True if the Hugging Face Hub responds within `timeout_s`; tested once per process.

    HF_ENDPOINT is respected; with HF_HUB_OFFLINE=1 the result is False without a request. The request runs in a thread
    that is abandoned after the time-out, because DNS look-ups ignore a socket's time-out.
    """
    if _offline():
        return False
    results: list[bool] = []
    thread = threading.Thread(target=lambda: results.append(_connects(timeout_s)), daemon=True)
    thread.start()
    thread.join(timeout_s)
    return bool(results and results[0])


def _connects(timeout_s: float) -> bool:
    """Return True if the Hub responds to an HTTP request; errors of a server or proxy do not count."""
    try:
        with urllib.request.urlopen(f"{hub_endpoint()}/api/models?limit=1", timeout=timeout_s):
            return True
    except urllib.error.HTTPError as error:
        return error.code < 500 and error.code != 407
    except (OSError, ValueError):
        return False


def hub_endpoint() -> str:
    """Return the Hub's URL: HF_ENDPOINT, else the public one."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def hub_unreachable_reason() -> str:
    """Return why the Hub is not reachable, for messages."""
    if _offline():
        return f"HF_HUB_OFFLINE forbids access to {hub_host()}"
    return f"{hub_host()} did not answer within {HUB_TIMEOUT_S:g} s"


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def hub_host() -> str:
    """Return the Hub's host name, for messages."""
    return urllib.parse.urlsplit(hub_endpoint()).hostname or hub_endpoint()
