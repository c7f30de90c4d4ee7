"""Is this machine ready? Each check says what it found, and where something is wrong, what to do."""

from __future__ import annotations

import importlib.metadata
import io
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.infra import environment
from pipelines.infra.errors import LabError

_MIN_DISK_GB = 5
_PACKAGES = (
    "torch",
    "transformers",
    "datasets",
    "evaluate",
    "jiwer",
    "accelerate",
    "huggingface_hub",
    "gradio",
    "soundfile",
    "soxr",
    "papermill",
    "nbconvert",
    "hopsworks",
    "espeakng-loader",
)


@dataclass(frozen=True)
class Check:
    """One line of the doctor's report."""

    name: str
    state: str
    """ok, note (works without it) or wrong."""
    found: str
    mend: str = ""


def examine(model_uri: str = "openai/whisper-tiny") -> list[Check]:
    """All checks, in the order in which the lab needs the things they look at."""
    checks = (_python, _packages, _device, _disk, _audio, _espeak, _hub, _token)
    return [_safely(check) for check in checks] + [_safely(lambda: _forward(model_uri), "forward pass")]


def as_dicts(checks: list[Check]) -> list[dict[str, Any]]:
    return [asdict(check) for check in checks]


def _safely(check: Callable[[], Check], name: str = "") -> Check:
    """A check that fails is a finding, not a crash."""
    try:
        return check()
    except LabError as error:
        return Check(name or check.__name__.strip("_"), "wrong", str(error), "do what the message says")
    except Exception as error:
        return Check(
            name or check.__name__.strip("_"),
            "wrong",
            f"{type(error).__name__}: {error}".splitlines()[0],
            "pip install -r requirements.txt",
        )


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        return Check("python", "ok", version)
    return Check("python", "wrong", version, "use Python 3.11, 3.12 or 3.13")


def _packages() -> Check:
    found, lacking = [], []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lacking.append(name)
    if lacking:
        return Check("packages", "wrong", f"missing: {', '.join(lacking)}", "pip install -r requirements.txt")
    return Check("packages", "ok", ", ".join(found))


def _device() -> Check:
    here = environment.detect()
    found = f"{here.device} ({here.device_name}), training in {here.dtype}, host {here.host}"
    if here.device == "cpu":
        return Check(
            "device",
            "note",
            found,
            "the tour runs on a CPU; whisper-small wants a GPU (Colab: Runtime, Change runtime type)",
        )
    return Check("device", "ok", found)


def _disk() -> Check:
    folder = environment.runs_folder()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free_gb = shutil.disk_usage(there).free / 1e9
    found = f"{free_gb:.0f} GB free for {folder}"
    if free_gb < _MIN_DISK_GB:
        return Check("disk", "wrong", found, f"free {_MIN_DISK_GB} GB, or set LAB_RUNS to a larger disk")
    return Check("disk", "ok", found)


def _audio() -> Check:
    """A sine survives a round trip through every format that the lab promises to read."""
    import numpy as np
    import soundfile

    from pipelines.speech import audio

    sine = np.sin(np.arange(24_000) * 0.05).astype(np.float32) * 0.5
    for form in ("wav", "flac", "ogg", "mp3"):
        file = io.BytesIO()
        soundfile.write(file, sine, 48_000, format=form)
        if abs(audio.decode(file.getvalue()).duration_s - 0.5) > 0.1:
            return Check("audio", "wrong", f"{form} does not survive decoding", "pip install --upgrade soundfile soxr")
    return Check("audio", "ok", f"wav, flac, ogg and mp3 decode (libsndfile {soundfile.__libsndfile_version__})")


def _espeak() -> Check:
    from pipelines.features.sources.synthetic import espeak

    speech = espeak.synthesise("Hej, det här är ett prov.", "sv+f1", 160, 50)
    return Check("speech synthesis", "ok", f"eSpeak NG {espeak.version()}, {len(speech)} bytes for a sentence")


def _hub() -> Check:
    host = environment.hub_host()
    if environment.hub_reachable():
        return Check("hub", "ok", f"{host} answers")
    return Check(
        "hub",
        "note",
        environment.hub_silence(),
        "the tour takes its weights from the registry mirror; anything else needs the Hub or a folder",
    )


def _token() -> Check:
    """Whether there is a token, never what it is."""
    from huggingface_hub import get_token

    if get_token():
        return Check("hub token", "ok", "there is one")
    return Check("hub token", "note", "none", "needed only to push or to read private models: set HF_TOKEN")


def _forward(model_uri: str) -> Check:
    """One sentence through the whole chain: synthesis, log-mel, real weights, text."""
    from pipelines.features.sources.synthetic import espeak
    from pipelines.inference.transcriber import Transcriber
    from pipelines.whisper import model as whisper_model

    ref = whisper_model.resolve(model_uri)
    heard = Transcriber(ref).transcribe(espeak.synthesise("God morgon, hur mår du i dag?", "sv+m1", 150, 50))
    if not heard.text:
        return Check("forward pass", "wrong", f"{ref.title} heard nothing", "fetch the model again")
    return Check("forward pass", "ok", f"{ref.title} heard “{heard.text}” in {heard.elapsed_s:.2f} s")
