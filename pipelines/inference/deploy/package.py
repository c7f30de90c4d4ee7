"""TODO: describe this module."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pipelines.features.sources.synthetic import espeak
from pipelines.infra import manifest
from pipelines.infra.errors import LabError
from pipelines.whisper import export, lineage
from pipelines.whisper import model as whisper_model
from pipelines.whisper.model import ModelRef

_SENTENCE = "Det här är ett prov på hur modellen hör."
_PATIENCE_S = 600


# ---- production


@dataclass(frozen=True)
class Proof:
    """A fresh process that served a folder."""

    engine: str
    text: str
    """What it heard."""
    loading_s: float
    """From the start of the process to a loaded model."""
    elapsed_s: float
    """From recording to text, the first time."""
    memory_mb: float
    """The most that the process held; 0 where the system does not tell."""
    without: tuple[str, ...]
    """Packages that it could not import."""


def production(ref: ModelRef, form: str, folder: Path, *, language: str = "sv", recording: Path | None = None) -> Proof:
    """Make `folder`: what a deployment of `ref` in one of export.FORMS needs, and nothing else.

    Before it is put there, a fresh process serves it through the transcriber, on `recording` or a spoken sentence;
    where it needs no torch it cannot import any. Raises LabError where that fails, or `folder` is in use.
    """
    folder = folder.expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LabError(f"{folder} must be empty or absent: name another")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".production-", dir=folder.parent) as place:
        made = export.convert(ref, form, to=Path(place) / "model")
        (made / lineage.FILE).write_text(_card(ref, form), "utf-8")
        facts = {name: value for name, value in manifest.read(made).items() if name != "files"}
        manifest.seal(made, **facts)
        spoken = recording or Path(place) / "sentence.wav"
        if recording is None:
            spoken.write_bytes(espeak.synthesise(_SENTENCE, "sv+f1", 160, 50))
        proof = prove(made, spoken, language)
        os.replace(made, folder)
    return proof


_SERVING = """
import json, pathlib, sys, time
started = time.monotonic()
folder, recording, language, *absent = sys.argv[1:]
sys.modules.update(dict.fromkeys(absent))
from pipelines.inference.transcriber import Transcriber
from pipelines.whisper import model
transcriber = Transcriber(model.resolve(folder), language)
loaded = time.monotonic()
heard = transcriber.transcribe(recording)
status = pathlib.Path("/proc/self/status")  # what getrusage tells, a child inherits
peaks = [line.split()[1] for line in status.read_text().splitlines() if "VmHWM" in line] if status.exists() else []
told = [transcriber.loaded.name, heard.text, loaded - started, heard.elapsed_s, int((peaks or [0])[0])]
print(json.dumps(told))
"""


def prove(folder: Path, recording: Path, language: str = "sv") -> Proof:
    """Serve a folder in a fresh process. LabError, with the last thing that it said, where it does not."""
    light = export.is_export(whisper_model.resolve(str(folder)))
    absent = ("torch", "transformers") if light else ()
    try:
        told = subprocess.run(
            [sys.executable, "-c", _SERVING, str(folder), str(recording), language, *absent],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
            capture_output=True,
            text=True,
            timeout=_PATIENCE_S,
        )
    except subprocess.TimeoutExpired:
        raise LabError(
            f"a fresh process did not serve the folder within {_PATIENCE_S:g} s, so it was not kept: try again on an "
            "idle machine"
        ) from None
    if told.returncode:
        said = (told.stderr.strip() or "nothing").splitlines()[-1]
        raise LabError(f"a fresh process could not serve the folder, so it was not kept: {said}")
    engine, text, loading_s, elapsed_s, peak_kib = json.loads(told.stdout.splitlines()[-1])
    return Proof(engine, text, round(loading_s, 2), round(elapsed_s, 2), round(peak_kib * 1024 / 1e6), absent)


def _card(ref: ModelRef, form: str) -> str:
    """A card: the front matter of the model's own but for its scores, and what this folder is."""
    from huggingface_hub import ModelCard, ModelCardData

    own = ref.folder / lineage.FILE
    front = ModelCard(own.read_text("utf-8")).data if own.is_file() else ModelCardData()
    front.eval_results = None
    name = lineage.base_of(ref).partition(" @ ")[0]
    return (
        f"---\n{front.to_yaml()}\n---\n\n# {name}, {form}\n\n"
        f"The weights of {name} @ {ref.revision} in the form {form}, with what serving them needs and nothing else:\n\n"
        "```bash\npython -m pipelines serve --model <this folder>\n```\n\nIts scores are not those of the model it was "
        "made of: `python -m pipelines export` holds the two against each other.\n"
    )
