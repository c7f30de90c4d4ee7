"""One training run: its settings, its folder, what identifies it, and the model it ends with."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import filelock

from pipelines.features import derived
from pipelines.features.cache import FeatureCache
from pipelines.infra import manifest
from pipelines.infra.errors import LabError
from pipelines.recipes import differences, digest
from pipelines.recipes.settings import EvaluationSettings, Recipe
from pipelines.training import distillation
from pipelines.training.callbacks.progress import Progress
from pipelines.training.checkpoints import sealed as sealed_checkpoints
from pipelines.training.checkpoints.fork import Fork
from pipelines.training.checkpoints.mirror import MirrorState
from pipelines.training.data import augmentation, recordings
from pipelines.whisper import config, lineage
from pipelines.whisper import model as whisper_model
from pipelines.whisper.model import ModelRef

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
"""Identity of a run, in its folder."""
CODE = "2"
"""Version of the training code: raised when the same recipe and cache would give other weights."""
NOT_IN_IDENTITY = (
    "model.base",  # the sha256 of its weights is in the identity instead
    "training.workers",
    "training.max_hours",
    "training.micro_batch",
    "training.checkpoint_activations",
    "training.fast_dev_run",
    "training.tracker",
    "training.keep_checkpoints",
    "training.remove_checkpoints",
    "evaluation.batch_frames",
    "evaluation.beam_size",
    "evaluation.bootstrap_samples",
    "evaluation.seed",
    "evaluation.stock_pipeline",
)
"""Settings that do not change the weights."""
_CONSTANTS = {"evaluation.batch_frames": EvaluationSettings().batch_frames}
"""Fields of every identity that once depended on a setting which changes no weight."""
_ONLY_IF_CHANGED = (
    *("model.freeze_encoder", "model.adapter", "model.lora_", "model.layer_drop", "model.load_in_8bit"),
    *("training.window_", "training.scheduler", "training.optimizer", "training.beta", "training.layer_decay"),
    *("training.label_smoothing", "training.bpe_dropout", "training.precision", "training.ema_"),
)
"""Settings, or prefixes of settings, that are in the identity only if they differ from their defaults.

Runs made before these settings existed keep their names.
"""


@dataclass(frozen=True)
class TrainedModel:
    """A finished run."""

    uri: str
    """Folder of the model, which is the input of the inference pipeline."""
    digest: str
    best_step: int
    validation: dict[str, Any]
    """Validation score at the best step (scoring.Score as a dictionary)."""
    history: list[dict[str, float]] = field(repr=False)
    """One dictionary per log line: step, and loss, learning_rate, grad_norm or eval_loss, eval_wer."""
    seconds: float
    """Wall-clock seconds of training, over all sittings."""
    copies: MirrorState | None = None
    """Checkpoints at the URI that this sitting copied to, if there is one."""

    def as_dict(self) -> dict[str, Any]:
        """Return what `train --json` prints."""
        names = ("digest", "best_step", "validation", "seconds")
        copies = {"copies": asdict(self.copies)} if self.copies else {}
        return {"model_uri": self.uri, **{name: getattr(self, name) for name in names}, **copies}

    def __str__(self) -> str:
        best = f"model {self.uri}\nbest at step {self.best_step}: validation WER {self.validation['eval_wer']:.3f}"
        if not (n_cut := self.validation.get("eval_cut")):
            return best
        return f"{best}\nnote: {derived.cut_hypotheses(n_cut, 'validation')}"


@dataclass(frozen=True)
class TrainingRun:
    """Everything that one call of `loop.train` needs."""

    recipe: Recipe
    cache: FeatureCache
    base: ModelRef
    """Model that is tuned, or the teacher if the recipe names one."""
    folder: Path
    """Folder of the run: checkpoints while it lasts, then `model`."""
    progress: Progress = field(default_factory=Progress, repr=False)
    resume: str = ""
    """URI that checkpoints are copied to and resumed from; empty for none."""
    fork: Fork | None = None
    """Weights of another run to start from."""
    until: int = 0
    """Pause at the first checkpoint from this step on; 0 for no pause. It is not part of the run's identity."""
    derived: Mapping[str, int] = field(default_factory=dict)
    """Settings of the recipe that were `auto` and were derived from the cache (features/derived.py), by name."""

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the weights, see `run_identity`; as the folder records it, if it is of this run."""
        expected, recorded = run_identity(self.recipe, self.cache, self.base, self.fork), recorded_identity(self.folder)
        return recorded if recorded and not run_differences(expected, recorded) else expected

    @cached_property
    def digest(self) -> str:
        """Digest of the identity."""
        return digest(self.identity)

    @property
    def start(self) -> ModelRef:
        """Weights that training starts from."""
        return self.fork.start(self.base) if self.fork else self.base

    @property
    def origin(self) -> str:
        """Name of the weights that training starts from, for messages."""
        return lineage.origin_of({"base": self.base.title, "fork": self.fork and self.fork.lineage})

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / "checkpoints"

    def newest_checkpoint(self) -> Path | None:
        """Return the newest whole checkpoint; log those that are skipped."""
        return sealed_checkpoints.newest_complete(self.checkpoints, run_digest=self.digest)


def run_identity(recipe: Recipe, cache: FeatureCache, base: ModelRef, fork: Fork | None = None) -> dict[str, Any]:
    """Return everything that decides the weights, as one flat dictionary.

    Its digest names the run, and a resumed run compares it field by field.
    """
    recipe = derived.resolve(recipe, cache)
    settings = recipe.settings("model", "training", "evaluation") | {"language": recipe.language}
    for name in NOT_IN_IDENTITY:
        settings.pop(name)
    settings |= _CONSTANTS
    changed = recipe.changed("model") | recipe.changed("training")
    settings = {
        name: value for name, value in settings.items() if name in changed or not name.startswith(_ONLY_IF_CHANGED)
    }
    augment = recipe.changed("augment")
    augment |= {"code.augmentation": augmentation.CODE} if augment else {}
    model = whisper_model.identity(base) | (config.unusual_masking(base.folder) if recipe.model.spec_augment else {})
    weights = {f"base.{name}": value for name, value in model.items()}
    windows = {"code.recordings": recordings.CODE} if recordings.are_used(recipe, cache) else {}
    started = {f"fork.{name}": value for name, value in fork.lineage.items()} if fork else {}
    distilled = _distillation_identity(recipe)
    given = {**settings, **augment, **windows, **weights, **distilled, **started}
    return {**given, "cache": cache.digest, "code.training": CODE}


def _distillation_identity(recipe: Recipe) -> dict[str, Any]:
    """Return the settings of distillation, without the teacher: its weights are those of the base."""
    settings = recipe.changed("distillation")
    if settings.pop("distillation.teacher", None) is None:
        return {}
    return {**settings, "code.distillation": distillation.CODE}


def recorded_identity(folder: Path) -> dict[str, Any] | None:
    """Return the identity in the run.json of a run's folder; None if there is none."""
    return manifest.read_json(folder / RUN_FILE)


def run_differences(expected: dict[str, Any], actual: dict[str, Any]) -> list[str]:
    """Return one line for each field in which two runs differ; fields that change no weight are left out."""
    return differences(expected | _CONSTANTS, actual | _CONSTANTS)


def folder_of(experiment: Path, identity: dict[str, Any]) -> Path:
    """Return the folder of the run with this identity below the experiment's folder.

    It is `train-<digest>`, or an existing one that an older version named by a setting which changes no weight.
    """
    folder = experiment / f"train-{digest(identity)}"
    if folder.exists():
        return folder
    same = [other for other, recorded in _other_runs(folder) if not run_differences(identity, recorded)]
    return same[0] if same else folder


def log_unfinished_runs(folder: Path, identity: dict[str, Any]) -> None:
    """Log how a run that starts now differs from the newest unfinished run beside it, which is not continued."""
    for other, recorded in [] if folder.exists() else _other_runs(folder):
        if finished_model(other, thorough=False) is None and any((other / "checkpoints").glob("checkpoint-*")):
            changed = "; ".join(run_differences(identity, recorded))
            logger.info(f"note: this is a new run. {other} is unfinished and is not continued, because of {changed}")
            return


def _other_runs(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return the run folders beside `folder` with their identities, newest first."""
    paths = sorted(folder.parent.glob(f"train-*/{RUN_FILE}"), key=lambda path: -path.stat().st_mtime)
    runs = [(path.parent, recorded_identity(path.parent)) for path in paths if path.parent != folder]
    return [(other, recorded) for other, recorded in runs if recorded]


def refuse_other_run(folder: Path, identity: dict[str, Any]) -> None:
    """Raise LabError if the folder's run.json names another run; write that file in a new folder."""
    path = folder / RUN_FILE
    recorded = manifest.read_json(path)
    if recorded is None:
        if path.exists() and folder.name != f"train-{digest(identity)}":
            raise LabError(f"{path} is damaged, so it is unknown which run {folder} holds: name another folder")
        manifest.write_json(path, identity)
        return
    changed = run_differences(identity, recorded)
    if changed:
        raise LabError(
            f"{folder} belongs to another run: {'; '.join(changed)}. Name another folder, go back to "
            f"that recipe, or start a new run from its weights with --fork {folder}"
        )


def lock_run(folder: Path, timeout_s: float = 0.0) -> filelock.FileLock:
    """Return the acquired lock of a run's folder, a context manager; raise LabError if another process holds it."""
    try:
        return filelock.FileLock(folder / ".lock", timeout=timeout_s).acquire()
    except filelock.Timeout:
        raise LabError(f"another process trains in {folder} right now: wait for it, or stop it first") from None


def finished_model(folder: Path, *, thorough: bool = True) -> TrainedModel | None:
    """Return the model of a run's folder, None if the run is not finished or its model is damaged.

    Without `thorough` only sizes are compared.
    """
    model = folder / "model"
    if manifest.problem(model, thorough=thorough) is not None:
        return None
    facts = json.loads((model / "training.json").read_text("utf-8"))
    return TrainedModel(str(model), manifest.read(model)["digest"], **facts)
