"""A folder with a model and only what serving it needs, tested by a new process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from pipelines.features.sources.synthetic import espeak
from pipelines.infra import manifest
from pipelines.infra.errors import LabError
from pipelines.infra.parallel import work_folder
from pipelines.whisper import export, lineage
from pipelines.whisper import model as whisper_model
from pipelines.whisper.model import ModelRef

_SENTENCE = "Det här är ett prov på hur modellen hör."
_TIMEOUT_S = 600


@dataclass(frozen=True)
class Proof:
    """Measurements of a new process that served a folder."""

    engine: str
    text: str
    """Its transcript."""
    loading_s: float
    """From the start of the process to the loaded model."""
    elapsed_s: float
    """From the recording to the text, at the first call."""
    memory_mb: float
    """Peak memory of the process; 0 if the system does not report it."""
    without: tuple[str, ...]
    """Packages that it could not import."""


def production(ref: ModelRef, form: str, folder: Path, *, language: str = "", recording: Path | None = None) -> Proof:
    """Create `folder` with what a deployment of `ref` in one of export.FORMS needs, and nothing else.

    First a new process serves it with the transcriber, on `recording` or a synthetic sentence; a form that needs no
    torch is served without it. Raises LabError if that fails, if `folder` is not empty, or for one of FOREIGN_FORMS.
    """
    if form in export.FOREIGN_FORMS:
        raise LabError(f"this lab does not serve {form}: write it with `export --to {form}`, or name another form")
    folder = folder.expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LabError(f"{folder} must be empty or absent: name another")
    with work_folder.create(folder.parent, "production") as temporary:
        exported = export.convert(ref, form, to=temporary / "model")
        (exported / lineage.FILE).write_text(_model_card(ref, form), "utf-8")
        facts = {name: value for name, value in manifest.read(exported).items() if name != "files"}
        manifest.seal(exported, **facts | {"language": language or whisper_model.language_of(ref)})
        test_recording = recording or temporary / "sentence.wav"
        if recording is None:
            test_recording.write_bytes(espeak.synthesise(_SENTENCE, "sv+f1", 160, 50))
        proof = prove(exported, test_recording, language)
        os.replace(exported, folder)
    return proof


_SERVE_SCRIPT = """
import json, pathlib, sys, time
started = time.monotonic()
folder, recording, language, *absent = sys.argv[1:]
sys.modules.update(dict.fromkeys(absent))
from pipelines.inference.transcriber import Transcriber
from pipelines.whisper import model
transcriber = Transcriber(model.resolve(folder), language)
loaded = time.monotonic()
transcript = transcriber.transcribe(recording)
status = pathlib.Path("/proc/self/status")  # a child inherits the peak that getrusage reports
peaks = [line.split()[1] for line in status.read_text().splitlines() if "VmHWM" in line] if status.exists() else []
fields = [transcriber.loaded.name, transcript.text, loaded - started, transcript.elapsed_s, int((peaks or [0])[0])]
print(json.dumps(fields))
"""


def prove(folder: Path, recording: Path, language: str = "") -> Proof:
    """Serve a folder in a new process. Raises LabError with the last line of its error output if that fails."""
    is_export = export.is_export(whisper_model.resolve(str(folder)))
    absent = ("torch", "transformers") if is_export else ()
    try:
        done = subprocess.run(
            [sys.executable, "-c", _SERVE_SCRIPT, str(folder), str(recording), language, *absent],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise LabError(
            f"a fresh process did not serve the folder within {_TIMEOUT_S:g} s, so it was not kept: try again on an "
            "idle machine"
        ) from None
    if done.returncode:
        reason = (done.stderr.strip() or "nothing").splitlines()[-1]
        raise LabError(f"a fresh process could not serve the folder, so it was not kept: {reason}")
    engine, text, loading_s, elapsed_s, peak_kib = json.loads(done.stdout.splitlines()[-1])
    return Proof(engine, text, round(loading_s, 2), round(elapsed_s, 2), round(peak_kib * 1024 / 1e6), absent)


def _model_card(ref: ModelRef, form: str) -> str:
    """Return a model card with the metadata of the model's own card, without its scores."""
    from huggingface_hub import ModelCard, ModelCardData

    path = ref.folder / lineage.FILE
    data = ModelCard(path.read_text("utf-8")).data if path.is_file() else ModelCardData()
    data.eval_results = None
    name = lineage.base_of(ref).partition(" @ ")[0]
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {name}, {form}\n\n"
        f"The weights of {name} @ {ref.revision} in the form {form}, with only what serving them needs:\n\n"
        "```bash\npython -m pipelines serve --model <this folder>\n```\n\nIts scores may differ from those of the "
        "original model: `python -m pipelines export` compares the two.\n"
    )
