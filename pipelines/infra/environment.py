"""Where am I: Colab, Kaggle, a Space or a machine of one's own; which device; whether the Hub answers.

Everything here is a returned value. Nothing is decided at import.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import logging
import os
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
from pipelines.infra.errors import LabError

logger = logging.getLogger(__name__)

HUB_TIMEOUT_S = 3.0
ROOT = Path(__file__).resolve().parents[2]
_LIGHT = {
    "espeakng_loader": "espeakng-loader>=0.2.4",
    "jiwer": "jiwer>=4,<5",
    "soxr": "soxr>=0.5",
    "soundfile": "soundfile>=0.12.1",
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
"""Module to requirement: all that the three notebooks need besides torch."""


@dataclass(frozen=True)
class Environment:
    """What a stage needs to know of the machine it runs on."""

    host: str
    """colab, kaggle, space or local."""
    device: str
    """cuda, mps or cpu."""
    dtype: str
    """The fastest training precision the device has: bfloat16, float16 or float32."""
    device_name: str

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def detect() -> Environment:
    """Look at the machine. Imports torch (about 1 s)."""
    import torch

    if torch.cuda.is_available():
        dtype = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
        return Environment(host(), "cuda", dtype, torch.cuda.get_device_name())
    if torch.backends.mps.is_available():
        return Environment(host(), "mps", "float32", "Apple GPU")
    return Environment(host(), "cpu", "float32", f"{torch.get_num_threads()} CPU threads")


def share_cores() -> None:
    """Let compute threads sleep while they wait for each other; call it before torch is imported.

    By default they spin. Beside anything else that runs, a browser or a second notebook, that makes a training step on
    two cores 4 to 6 times slower (measured: 0.9 s asleep, 1 to 9 s spinning); on an idle machine it costs
    little (0.53 to 0.57 s asleep, 0.49 to 0.53 s spinning).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def host() -> str:
    """colab, kaggle, space or local, by the variables these places set."""
    if "COLAB_RELEASE_TAG" in os.environ or "COLAB_GPU" in os.environ:
        return "colab"
    if "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
        return "kaggle"
    return "space" if "SPACE_ID" in os.environ else "local"


def interactive() -> bool:
    """Whether somebody sits before this kernel: Colab, Jupyter or an editor, and not papermill."""
    return host() == "colab" or "JPY_SESSION_NAME" in os.environ or "VSCODE_PID" in os.environ


def runs_folder(named: str | Path = "") -> Path:
    """Where artefacts go: the folder named, else LAB_RUNS, else `runs/` beside the package."""
    return Path(named or os.environ.get("LAB_RUNS") or ROOT / "runs").expanduser().absolute()


def prepare(runs: str | Path = "", *uris: str) -> Environment:
    """Make a notebook's machine ready: install what Colab and Kaggle lack, mount Drive if one of the places is there.

    What is installed already, torch, numpy and pandas above all, is pinned for pip, so that nothing is replaced under
    a running kernel. On a machine of one's own nothing is installed: a missing package is an error that names the
    command.
    """
    share_cores()
    console.configure()
    lacking = [wanted for module, wanted in _LIGHT.items() if importlib.util.find_spec(module) is None]
    if lacking and host() not in ("colab", "kaggle"):
        raise LabError(f"this kernel lacks {', '.join(lacking)}. Run: pip install -r requirements.txt")
    if lacking:
        logger.info(f"installing {', '.join(lacking)} ...")
        _pip_install(lacking)
    if host() == "colab" and any(str(place).startswith("/content/drive") for place in (runs, *uris)):
        from google.colab import drive  # exists on Colab alone

        drive.mount("/content/drive")
    here = detect()
    logger.info(f"{here.host}: {here.device_name}, training in {here.dtype}; artefacts go to {runs_folder(runs)}")
    return here


def _pip_install(wanted: list[str]) -> None:
    """Install without touching what is there: every installed package is its own constraint."""
    installed: dict[str, str] = {}
    for item in importlib.metadata.distributions():  # a system's own packages may come second: the first is imported
        installed.setdefault(item.name.lower().replace("_", "-"), f"{item.name}=={item.version}")
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as pins:
        pins.write("\n".join(sorted(installed.values())))
        pins.flush()
        done = subprocess.run(
            [sys.executable, "-m", "pip", "install", "-q", "-c", pins.name, *wanted], capture_output=True, text=True
        )
    if done.returncode:
        reason = (done.stderr.strip() or "pip failed").splitlines()[-1]
        raise LabError(f"could not install {' '.join(wanted)}: {reason}. Run: pip install {' '.join(wanted)}")
    importlib.invalidate_caches()


def cache_folder() -> Path:
    """Where downloads that every run shares are kept: LAB_CACHE, else the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("LAB_CACHE") or Path(base) / "swedish-whisper-lab").expanduser().absolute()


@functools.cache
def hub_reachable(timeout_s: float = HUB_TIMEOUT_S) -> bool:
    """Whether the Hugging Face Hub answers: asked once per process, decided within `timeout_s`.

    HF_ENDPOINT is honoured, HF_HUB_OFFLINE=1 answers no at once. Name look-ups can hang for longer than any socket's
    time-out, so the question is put by a thread that is left behind when the time is up.
    """
    if _offline():
        return False
    answer: list[bool] = []
    asker = threading.Thread(target=lambda: answer.append(_connects(timeout_s)), daemon=True)
    asker.start()
    asker.join(timeout_s)
    return bool(answer and answer[0])


def _connects(timeout_s: float) -> bool:
    """Whether the Hub answers an HTTP request; any answer counts but a server's or a proxy's failure."""
    try:
        with urllib.request.urlopen(f"{hub_endpoint()}/api/models?limit=1", timeout=timeout_s):
            return True
    except urllib.error.HTTPError as error:
        return error.code < 500 and error.code != 407
    except (OSError, ValueError):
        return False


def hub_endpoint() -> str:
    """The Hub's address: HF_ENDPOINT, else the public one."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def hub_silence() -> str:
    """Why the Hub is out of reach, for messages."""
    if _offline():
        return f"HF_HUB_OFFLINE forbids to ask {hub_host()}"
    return f"{hub_host()} did not answer within {HUB_TIMEOUT_S:g} s"


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def hub_host() -> str:
    """The Hub's host name, for messages."""
    return urllib.parse.urlsplit(hub_endpoint()).hostname or hub_endpoint()
