"""The inference pipeline: load a model and describe it. Used by notebook 03, the app, the API and the commands."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.inference.transcriber import Transcriber
from pipelines.infra import environment
from pipelines.infra.errors import LabError
from pipelines.recipes.commands import command
from pipelines.recipes.runs import newest_finished_model, read_stages
from pipelines.recipes.settings import Recipe
from pipelines.speech.intervals import Units
from pipelines.whisper import lineage
from pipelines.whisper import model as whisper_model

if TYPE_CHECKING:
    from pipelines.whisper.model import ModelRef

BASE_MODEL = "openai/whisper-tiny"
SPACE_FILE = "space.json"
"""Names the model of a published Space; inference/deploy/space.py writes it beside app.py."""


def load_transcriber(recipe: Recipe, model_uri: str = "", *, runs: str | Path = "") -> Transcriber:
    """Load the model at `model_uri`, by default the one that the recipe's training stage recorded.

    Raises LabError if neither exists.
    """
    uri = model_uri or read_stages(recipe, runs).get("training", {}).get("model_uri")
    if not uri:
        raise LabError(
            f"no model for recipe {recipe.name}: run 02_training_pipeline first "
            f"({command('train', recipe=recipe, runs=runs)}), or give its URI as model_uri"
        )
    ref = whisper_model.resolve(uri)
    return Transcriber(ref, whisper_model.language_of(ref, recipe.language))


def choose_model(uri: str | None, runs: Path) -> tuple[str, str]:
    """Return the URI of the model to serve and the reason for it.

    The reason is `named` (by `uri`), `newest` (finished run below `runs`) or `base`.
    """
    if uri:
        return uri, "named"
    newest = newest_finished_model(runs)
    return (str(newest), "newest") if newest else (BASE_MODEL, "base")


def space_model_uri(folder: Path) -> str | None:
    """Return the model URI that the published Space in `folder` names, or None if `folder` is not a Space."""
    try:
        return json.loads((folder / SPACE_FILE).read_text("utf-8"))["model"]
    except FileNotFoundError:
        return None


def default_log() -> Path:
    """Return the path of the feedback log: LAB_LOG, else log.csv beside app.py."""
    return Path(os.environ.get("LAB_LOG") or environment.ROOT / "log.csv")


def is_lost_on_restart(log: Path) -> bool:
    """Return whether a restart deletes the log: a Space does not preserve files beside its app.py."""
    return "SPACE_ID" in os.environ and log.absolute().is_relative_to(environment.ROOT)


def model_info(ref: ModelRef) -> dict[str, str]:
    """Return what visitors may read about the model: name, revision, base, quantisation, test. No local path.

    Fields without a value are left out.
    """
    info = {
        "name": _without_folders(ref.name, ref.folder),
        "revision": ref.revision,
        "base": lineage.origin_of({**ref.facts, "base": _without_folders(ref.facts.get("base") or "")}),
        "quantisation": ref.quantisation or "",
        "test": _format_test_score(ref.facts.get("test")),
    }
    return {name: value for name, value in info.items() if value}


def model_title(ref: ModelRef) -> str:
    """Return `name @ revision` for the page and the log, without the local paths that ModelRef.title may contain."""
    info = model_info(ref)
    quantisation = f" ({ref.quantisation})" if ref.quantisation else ""
    return f"{info['name']}{quantisation} @ {ref.revision}"


def _without_folders(name: str, folder: Path | None = None) -> str:
    """Return `name`; for a path its last part, or the name of the run if the last part is `model`."""
    if not (name.startswith((".", "/", "~")) or Path(name).is_dir()):
        return name
    folder = folder or Path(name)
    return folder.parent.name if folder.name == "model" else folder.name


def _format_test_score(score: dict[str, Any] | None) -> str:
    """Format a test score, or return "" if the model was not scored.

    Example: `WER 0.254 (95 % 0.221–0.290, n = 160, 12 speakers; by transformers)`. The score was measured with
    transformers, whichever engine serves the model.
    """
    if not score:
        return ""
    units = Units.of(score)
    interval = units.interval(score["ci95"], to="–")
    return f"WER {score['wer']:.3f} (95 % {interval}, n = {units.n}, {units.who}; by transformers)"
