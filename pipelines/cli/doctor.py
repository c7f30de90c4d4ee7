"""The command that checks this machine: doctor. Each check reports what it found and how to fix a problem."""

from __future__ import annotations

import importlib.metadata
import io
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from pipelines.cli.options import CacheUri, Json, Overrides, Runs, load_recipe, print_result
from pipelines.infra import console, environment
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


def doctor(
    model: Annotated[str, typer.Option(help="Model for the test transcription.")] = "openai/whisper-tiny",
    recipe: Annotated[
        str,
        typer.Option(
            "--recipe", "-r", help="Estimate the memory that training this recipe needs, instead of the checks."
        ),
    ] = "",
    set_: Overrides = (),
    runs: Runs = "",
    cache: CacheUri = "",
    gpu_memory: Annotated[
        str,
        typer.Option(metavar="SIZE", help="Compare with a GPU of this size, such as 16GB; default: this machine."),
    ] = "",
    as_json: Json = False,
):
    """Check this machine: Python, packages, device, disk, audio, Hub, and one test transcription.

    Example: python -m pipelines doctor

    Does a recipe fit into a GPU? python -m pipelines doctor --recipe base --gpu-memory 16GB
    """
    if recipe:
        from pipelines.training.memory import report

        needed = report.examine(load_recipe(recipe, set_), runs=runs, cache=cache, gpu_memory=gpu_memory)
        print_result(as_json, needed.as_dict(), str(needed))
        raise typer.Exit(0 if needed.fits else 1)
    if unused := [name for name, value in (("--set", set_), ("--cache", cache), ("--gpu-memory", gpu_memory)) if value]:
        raise LabError(f"{unused[0]} belongs to a recipe: name one with --recipe")
    diagnosis = Diagnosis(tuple(check_all(model)))
    print_result(as_json, diagnosis.as_dict(), str(diagnosis))
    if diagnosis.problems:
        raise typer.Exit(1)


@dataclass(frozen=True)
class Check:
    """The result of one check."""

    name: str
    state: str
    """ok, note (an optional part is missing) or wrong."""
    found: str
    mend: str = ""
    """How to fix it."""

    def __str__(self) -> str:
        fix = f"\n{'':24}-> {self.mend}" if self.mend else ""
        return f"{self.state:<6}{self.name:<18}{self.found}{fix}"


@dataclass(frozen=True)
class Diagnosis:
    """The results of all checks."""

    checks: tuple[Check, ...]

    @property
    def problems(self) -> int:
        return sum(check.state == "wrong" for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        return {"checks": [asdict(check) for check in self.checks], "ready": not self.problems}

    def __str__(self) -> str:
        verdict = f"{self.problems} problem(s) to fix" if self.problems else "ready. Next: make run"
        return "\n".join([*map(str, self.checks), verdict])


def check_all(model_uri: str) -> list[Check]:
    """Run all checks, in the order in which the lab needs what they check."""
    checks = (_python, _packages, _device, _disk, _audio, _espeak, _hub, _token)
    return [_run(check) for check in checks] + [_run(lambda: _transcription(model_uri), "forward pass")]


def _run(check: Callable[[], Check], name: str = "") -> Check:
    """Run a check; return an exception as a result."""
    name = name or check.__name__.strip("_")
    try:
        return check()
    except LabError as error:
        return Check(name, "wrong", str(error), "do what the message says")
    except Exception as error:
        first_line = f"{type(error).__name__}: {error}".splitlines()[0]
        return Check(name, "wrong", first_line, "pip install -r requirements.txt")


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        return Check("python", "ok", version)
    return Check("python", "wrong", version, "use Python 3.11, 3.12 or 3.13")


def _packages() -> Check:
    installed, missing = [], []
    for name in _PACKAGES:
        try:
            installed.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return Check("packages", "wrong", f"missing: {', '.join(missing)}", "pip install -r requirements.txt")
    return Check("packages", "ok", ", ".join(installed))


def _device() -> Check:
    machine = environment.detect()
    text = f"{machine.device} ({machine.device_name}), training in {machine.dtype}, host {machine.host}"
    if machine.device == "cpu":
        advice = "the tour runs on a CPU; whisper-small needs a GPU (Colab: Runtime, Change runtime type)"
        return Check("device", "note", text, advice)
    return Check("device", "ok", text)


def _disk() -> Check:
    folder = environment.runs_folder()
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    free_gb = shutil.disk_usage(parent).free / 1e9
    text = f"{free_gb:.0f} GB free for {folder}"
    if free_gb < _MIN_DISK_GB:
        return Check("disk", "wrong", text, f"free {_MIN_DISK_GB} GB, or set LAB_RUNS to a larger disk")
    return Check("disk", "ok", text)


def _audio() -> Check:
    """Encode and decode a sine in every supported format."""
    import numpy as np
    import soundfile

    from pipelines.speech import audio

    sine = np.sin(np.arange(24_000) * 0.05).astype(np.float32) * 0.5
    for form in ("wav", "flac", "ogg", "mp3"):
        file = io.BytesIO()
        soundfile.write(file, sine, 48_000, format=form)
        if abs(audio.decode(file.getvalue()).duration_s - 0.5) > 0.1:
            return Check("audio", "wrong", f"{form} is not decoded correctly", "pip install --upgrade soundfile soxr")
    return Check("audio", "ok", f"wav, flac, ogg and mp3 decode (libsndfile {soundfile.__libsndfile_version__})")


def _espeak() -> Check:
    from pipelines.features.sources.synthetic import espeak

    speech = espeak.synthesise("Hej, det här är ett prov.", "sv+f1", 160, 50)
    return Check("speech synthesis", "ok", f"eSpeak NG {espeak.version()}, {len(speech)} bytes for a sentence")


def _hub() -> Check:
    if environment.hub_reachable():
        return Check("hub", "ok", f"{environment.hub_host()} answers")
    advice = "the tour takes its weights from the registry mirror; anything else needs the Hub or a folder"
    return Check("hub", "note", environment.hub_unreachable_reason(), advice)


def _token() -> Check:
    """Check that a token is set, without printing it."""
    from huggingface_hub import get_token

    if get_token():
        return Check("hub token", "ok", "there is one")
    return Check("hub token", "note", "none", "needed only to push or to read private models: set HF_TOKEN")


def _transcription(model_uri: str) -> Check:
    """Transcribe one synthetic sentence: speech synthesis, log-mel, model, text."""
    from pipelines.features.sources.synthetic import espeak
    from pipelines.inference.transcriber import Transcriber
    from pipelines.whisper import model as whisper_model

    speech = espeak.synthesise("God morgon, hur mår du i dag?", "sv+m1", 150, 50)
    with console.silenced():
        ref = whisper_model.resolve(model_uri)
        transcript = Transcriber(ref).transcribe(speech)
    if not transcript.text:
        return Check("forward pass", "wrong", f"the transcript of {ref.title} is empty", "fetch the model again")
    text = f"{ref.title} transcribed “{transcript.text}” in {transcript.elapsed_s:.2f} s"
    return Check("forward pass", "ok", text)
