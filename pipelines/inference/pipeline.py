"""TODO: describe this module."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.inference.transcriber import Transcriber
from pipelines.infra import environment
from pipelines.infra.errors import LabError
from pipelines.recipes.runs import newest_finished_model, stages
from pipelines.recipes.settings import Recipe
from pipelines.whisper import model as whisper_model

if TYPE_CHECKING:
    from pipelines.whisper.model import ModelRef


def transcriber(recipe: Recipe, model_uri: str = "", *, runs: str | Path = "") -> Transcriber:
    """Stage 03: the model at `model_uri`, else what stage 02 noted last, ready to transcribe."""
    uri = model_uri or stages(recipe, runs).get("training", {}).get("model_uri")
    if not uri:
        raise LabError(
            f"no model for recipe {recipe.name}: run 02_training_pipeline first "
            f"(python -m pipelines train --recipe {recipe.name}), or give its URI as model_uri"
        )
    ref = whisper_model.resolve(uri)
    return Transcriber(ref, recipe.language)


BASE_MODEL = "openai/whisper-tiny"
SPACE = "space.json"
"""What tells a Space its model: pipelines/inference/deploy/space.py writes it beside app.py."""


def choose(uri: str | None, runs: Path) -> tuple[str, str]:
    """The URI of the model to serve, and why: `named` (by `uri`), `newest` (finished run below `runs`) or `base`."""
    if uri:
        return uri, "named"
    newest = newest_finished_model(runs)
    return (str(newest), "newest") if newest else (BASE_MODEL, "base")


def of_space(folder: Path) -> str | None:
    """The URI of the model that this copy of the page was published with; None where it was not published."""
    try:
        return json.loads((folder / SPACE).read_text("utf-8"))["model"]
    except FileNotFoundError:
        return None


def usual_log() -> Path:
    """Where feedback goes if nobody names a place: LAB_LOG, else beside app.py."""
    return Path(os.environ.get("LAB_LOG") or environment.ROOT / "log.csv")


def is_fleeting(log: Path) -> bool:
    """Whether a log is lost when the page starts anew: a Space keeps nothing of what lies beside its app.py."""
    return "SPACE_ID" in os.environ and log.absolute().is_relative_to(environment.ROOT)


def card(ref: ModelRef) -> dict[str, str]:
    """What a visitor may know of the model: name, revision, base, quantisation, test. Never a path of this machine."""
    known = {
        "name": _public(ref.name, ref.folder),
        "revision": ref.revision,
        "base": _public(ref.facts.get("base") or ""),
        "quantisation": ref.quantisation or "",
        "test": _test(ref.facts.get("test")),
    }
    return {name: value for name, value in known.items() if value}


def title(ref: ModelRef) -> str:
    """Name @ revision for the page and the log, without the paths that ModelRef.title may hold."""
    known = card(ref)
    quantised = f" ({ref.quantisation})" if ref.quantisation else ""
    return f"{known['name']}{quantised} @ {ref.revision}"


def _public(name: str, folder: Path | None = None) -> str:
    """`name`, or for a path what tells it from others: its last part, or the run's name where that part is `model`."""
    if not (name.startswith((".", "/", "~")) or Path(name).is_dir()):
        return name
    folder = folder or Path(name)
    return folder.parent.name if folder.name == "model" else folder.name


def _test(score: dict[str, Any] | None) -> str:
    """`WER 0.254 (95 % 0.221-0.290, n = 160, 12 speakers; by transformers)`, which scored it, whatever serves it.

    Empty where the model was not scored.
    """
    if not score:
        return ""
    low, high = score["ci95"]
    n = f"n = {score['n']}, {score['speakers']} speakers; by transformers"
    return f"WER {score['wer']:.3f} (95 % {low:.3f}–{high:.3f}, {n})"
