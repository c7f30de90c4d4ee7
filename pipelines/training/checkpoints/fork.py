"""A new run that starts on purpose from the weights of another; where it comes from is part of what it is."""

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

_NOTE = "run.json"


@dataclass(frozen=True)
class Fork:
    """The weights that a run starts from, and the run and step that made them."""

    folder: Path
    run: str
    """The digest of the run that made them."""
    step: int
    weights_sha256: str

    @property
    def lineage(self) -> dict[str, Any]:
        """What the new run's identity and its model's manifest tell."""
        return {"run": self.run, "step": self.step, "weights_sha256": self.weights_sha256}

    def start(self, base: ModelRef) -> ModelRef:
        """What training starts from: the base model as the other run had tuned it."""
        return replace(base, folder=self.folder, origin="fork", revision=f"{self.run} step {self.step}")


def find(uri: str, base: ModelRef) -> Fork:
    """The weights at `uri`: a run's folder (its model, else its newest whole checkpoint), a checkpoint or a model.

    Raises LabError where there is none, where it is damaged, or where it was tuned from other weights than `base`.
    """
    folder = stores.at_hand(uri)
    if (folder / _NOTE).exists():
        folder = _newest(folder)
    facts = manifest.require_whole(folder, "the weights to fork from", "Name a run's folder, a checkpoint or a model")
    if facts.get("kind") not in ("checkpoint", "model"):
        raise LabError(f"{folder} holds no weights of a run: name a run's folder, a checkpoint or a model to fork from")
    if "model.safetensors" not in facts["files"]:
        raise LabError(f"{folder} holds an adapter without its base model: finish that run and fork from its model")
    _refuse_other_base(folder, base)
    run = facts["run_digest"] if facts["kind"] == "checkpoint" else facts["digest"]
    return Fork(folder, run, _step(folder, facts), facts["files"]["model.safetensors"]["sha256"])


def _newest(run: Path) -> Path:
    """What a run's folder has to offer."""
    if manifest.problem(run / "model", thorough=False) is None:
        return run / "model"
    name = digest(json.loads((run / _NOTE).read_text("utf-8")))
    newest = sealed_checkpoints.newest_complete(run / "checkpoints", run_digest=name)
    if newest is None:
        raise LabError(f"{run} has no whole checkpoint yet: let it come to one, or train from the base model")
    return newest


def _step(folder: Path, facts: dict[str, Any]) -> int:
    if facts["kind"] == "checkpoint":
        return facts["step"]
    return json.loads((folder / "training.json").read_text("utf-8"))["best_step"]


def _refuse_other_base(folder: Path, base: ModelRef) -> None:
    """Where the other run's own note lies beside the weights, it tells what they were tuned from."""
    notes = [place / _NOTE for place in list(folder.parents)[:2] if (place / _NOTE).exists()]
    wanted = whisper_model.identity(base)["weights_sha256"]
    if notes and json.loads(notes[0].read_text("utf-8")).get("base.weights_sha256") != wanted:
        raise LabError(f"{folder} was not tuned from {base.title}: set model.base to the model that it was tuned from")
