"""Start a new run from the weights of another run; the fork is part of the new run's identity."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipelines.infra import manifest, stores
from pipelines.infra.errors import LabError
from pipelines.recipes import digest
from pipelines.training.checkpoints import sealed as sealed_checkpoints
from pipelines.whisper import model as whisper_model
from pipelines.whisper.model import ModelRef

_RUN_FILE = "run.json"


@dataclass(frozen=True)
class Fork:
    """Weights to start from, and the run and step that wrote them."""

    folder: Path
    run: str
    """Digest of the run that wrote them."""
    step: int
    weights_sha256: str

    @property
    def lineage(self) -> dict[str, Any]:
        """Fields of the new run's identity and of its model's manifest."""
        return {"run": self.run, "step": self.step, "weights_sha256": self.weights_sha256}

    def start(self, base: ModelRef) -> ModelRef:
        """Return the base model with the weights of the other run."""
        return replace(base, folder=self.folder, origin="fork")


def find_weights(uri: str, base: ModelRef) -> Fork:
    """Return the weights at `uri`: a checkpoint, a model or a run's folder.

    Of a run's folder it is the model, or else the newest whole checkpoint. Raises LabError if there is none, if it is
    damaged, or if it was tuned from other weights than `base`.
    """
    folder = stores.local_folder(uri)
    if (folder / _RUN_FILE).exists():
        folder = _newest(folder)
    facts = manifest.require_complete(
        folder, "the weights to fork from", "Name a run's folder, a checkpoint or a model"
    )
    if facts.get("kind") not in ("checkpoint", "model"):
        raise LabError(f"{folder} holds no weights of a run: name a run's folder, a checkpoint or a model to fork from")
    if "model.safetensors" not in facts["files"]:
        raise LabError(f"{folder} holds an adapter without its base model: finish that run and fork from its model")
    _refuse_other_base(folder, base)
    run = facts["run_digest"] if facts["kind"] == "checkpoint" else facts["digest"]
    return Fork(folder, run, _step(folder, facts), facts["files"]["model.safetensors"]["sha256"])


def _newest(run: Path) -> Path:
    """Return the model or the newest whole checkpoint of a run's folder."""
    if manifest.problem(run / "model", thorough=False) is None:
        return run / "model"
    name = digest(json.loads((run / _RUN_FILE).read_text("utf-8")))
    newest = sealed_checkpoints.newest_complete(run / "checkpoints", run_digest=name)
    if newest is None:
        raise LabError(f"{run} has no whole checkpoint yet: train it longer, or start from the base model")
    return newest


def _step(folder: Path, facts: dict[str, Any]) -> int:
    if facts["kind"] == "checkpoint":
        return facts["step"]
    return json.loads((folder / "training.json").read_text("utf-8"))["best_step"]


def _refuse_other_base(folder: Path, base: ModelRef) -> None:
    """Raise LabError if the other run's run.json, in a folder above the weights, names another base model."""
    paths = [parent / _RUN_FILE for parent in list(folder.parents)[:2] if (parent / _RUN_FILE).exists()]
    expected = whisper_model.identity(base)["weights_sha256"]
    if paths and json.loads(paths[0].read_text("utf-8")).get("base.weights_sha256") != expected:
        raise LabError(f"{folder} was not tuned from {base.title}: set model.base to the model that it was tuned from")
