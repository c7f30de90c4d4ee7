"""The folder of a run: what it trains, who trains in it, and the model that it ends with."""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import filelock

from pipelines.features.cache import FeatureCache
from pipelines.infra import manifest, redact
from pipelines.infra.errors import LabError
from pipelines.recipes import differences
from pipelines.recipes.settings import Recipe
from pipelines.training import adapters, distillation, model_card
from pipelines.training.callbacks import oom
from pipelines.training.callbacks.progress import history_of, seconds_of
from pipelines.training.checkpoints.fork import Fork
from pipelines.training.checkpoints.mirror import Kept
from pipelines.training.data import augmentation
from pipelines.whisper import confidence, lineage
from pipelines.whisper import model as whisper_model
from pipelines.whisper.confidence import Calibration
from pipelines.whisper.decoding import DecodingOptions
from pipelines.whisper.log_mel import FULL_FRAMES
from pipelines.whisper.model import ModelRef

CODE = "2"
"""Version of the code that trains: raised whenever the same recipe and cache would give other weights."""
NOT_OF_THE_WEIGHTS = (
    "model.base",  # its weights' sha256 stands in its place
    "training.workers",
    "training.max_hours",
    "training.micro_batch",
    "training.fast_dev_run",
    "training.tracker",
    "training.keep_checkpoints",
    "evaluation.bootstrap_samples",
    "evaluation.seed",
)
"""Settings that are no part of a run's identity."""
_TOLD_WHERE_CHANGED = (
    *("model.freeze_encoder", "model.adapter", "model.lora_"),
    *("training.window_", "training.scheduler", "training.optimizer", "training.beta"),
)
"""Settings, or their first letters, that are part of the identity only where they are not at their defaults: the runs
from before there were any keep their names."""


@dataclass(frozen=True)
class TrainedModel:
    """A finished run."""

    uri: str
    """The model's folder: what 03 takes."""
    digest: str
    best_step: int
    validation: dict[str, Any]
    """The validation score at the best step (scoring.Score as a dictionary)."""
    history: list[dict[str, float]] = field(repr=False)
    """One dictionary per log line: step, and loss, learning_rate, grad_norm or eval_loss, eval_wer."""
    seconds: float
    """Wall-clock seconds of training, over all sittings."""
    copies: Kept | None = None
    """What this sitting left at the URI that checkpoints are copied to, if there is one."""

    def as_dict(self) -> dict[str, Any]:
        """Return what `train --json` prints."""
        names = ("digest", "best_step", "validation", "seconds")
        copies = {"copies": asdict(self.copies)} if self.copies else {}
        return {"model_uri": self.uri, **{name: getattr(self, name) for name in names}, **copies}

    def __str__(self) -> str:
        return f"model {self.uri}\nbest at step {self.best_step}: validation WER {self.validation['eval_wer']:.3f}"


def run_identity(recipe: Recipe, cache: FeatureCache, base: ModelRef, fork: Fork | None = None) -> dict[str, Any]:
    """Flat: everything that decides the weights. Names the run; resume compares it field by field."""
    settings = recipe.settings("model", "training", "evaluation") | {"language": recipe.language}
    for name in NOT_OF_THE_WEIGHTS:
        settings.pop(name)
    changed = recipe.changed("model") | recipe.changed("training")
    settings = {
        name: value for name, value in settings.items() if name in changed or not name.startswith(_TOLD_WHERE_CHANGED)
    }
    told = {f"base.{name}": value for name, value in whisper_model.identity(base).items()}
    varied = recipe.changed("augment")
    varied |= {"code.augmentation": augmentation.CODE} if varied else {}
    told |= _of_distillation(recipe)
    told |= {f"fork.{name}": value for name, value in fork.lineage.items()} if fork else {}
    return {**settings, **varied, **told, "cache": cache.digest, "code.training": CODE}


def _of_distillation(recipe: Recipe) -> dict[str, Any]:
    """The teacher's weights stand in its place: they are the base."""
    told = recipe.changed("distillation")
    if told.pop("distillation.teacher", None) is None:
        return {}
    return {**told, "code.distillation": distillation.CODE}


def refuse_other_run(run: Path, identity: dict[str, Any]) -> None:
    """The run folder's own note of what it trains; written at the first start."""
    note = run / "run.json"
    if not note.exists():
        manifest.write_json(note, identity)
        return
    unlike = differences(identity, json.loads(note.read_text("utf-8")))
    if unlike:
        raise LabError(
            f"{run} belongs to another run: {'; '.join(unlike)}. Name another folder, go back to "
            f"that recipe, or start a new run from its weights with --fork {run}"
        )


def only_trainer(run: Path, patience_s: float = 0.0) -> filelock.FileLock:
    """The lock of a run's folder; use it as a context. LabError where another process holds it and goes on to."""
    try:
        return filelock.FileLock(run / ".lock", timeout=patience_s).acquire()
    except filelock.Timeout:
        raise LabError(f"another process trains in {run} right now: wait for it, or stop it first") from None


def finish(
    trainer: Any,
    recipe: Recipe,
    cache: FeatureCache,
    run: Path,
    run_digest: str,
    base: ModelRef,
    fork: Fork | None = None,
) -> TrainedModel:
    """Write the best weights as the run's model, and seal it."""
    state, folder = trainer.state, run / "model"
    best = state.best_global_step
    weights = Path(trainer.args.output_dir) / f"checkpoint-{best}"
    manifest.require_whole(weights, "the best checkpoint", f"Remove {run} and train again")
    best_model = adapters.load_checkpoint(weights, base)
    whisper_model.set_language(best_model, recipe.language)
    shutil.rmtree(folder, ignore_errors=True)
    whisper_model.save(best_model, trainer.processing_class, folder)
    fitted = _calibrated(best_model, trainer, recipe, cache, run)
    history = history_of(state)
    facts = {
        "best_step": best,
        "validation": next(row for row in history if row["step"] == best and "eval_wer" in row),
        "history": history,
        "seconds": seconds_of(history),
    }
    manifest.write_json(folder / "training.json", facts)
    manifest.write_json(folder / "recipe.json", redact.redact_settings(recipe.model_dump(mode="json")))
    told = {
        "digest": run_digest,
        "name": f"{recipe.name}-{run_digest}",
        "base": lineage.base_of(base),
        "cache": cache.digest,
        "context": recipe.training.context,
        "context_s": context_s(recipe, cache),
        "confidence": fitted.as_dict(),
        "quantisation": base.quantisation,
        "language": recipe.language,
        **model_card.facts_of(recipe, cache, base),
        **({"fork": fork.lineage} if fork else {}),
        **({"teacher": distillation.lineage(base)} if recipe.distillation.teacher else {}),
    }
    model_card.write(folder, told)
    manifest.seal(folder, kind="model", made=datetime.now(UTC).isoformat(timespec="seconds"), **told)
    return finished(run)


def context_s(recipe: Recipe, cache: FeatureCache) -> float:
    """The longest window that these weights have heard, in seconds: the longest training clip, or a window of 30 s."""
    if recipe.training.context == "full" or recipe.training.window_share:
        return FULL_FRAMES / 100
    return float(cache.rows["duration_s"].iloc[cache.split("train")].max())


def _calibrated(model: Any, trainer: Any, recipe: Recipe, cache: FeatureCache, run: Path) -> Calibration:
    """How sure the model may be of its words: one more look at validation, on the CPU where the device is full."""
    import torch

    options = DecodingOptions(
        recipe.language,
        recipe.evaluation.max_new_tokens,
        full_context=recipe.training.context == "full",
        batch_frames=oom.Room(run, recipe.evaluation.batch_frames).frames,
    )
    for device in (trainer.args.device, "cpu"):
        with contextlib.suppress(torch.OutOfMemoryError):
            return confidence.calibrate(
                model.to(device), trainer.processing_class, cache, cache.split("validation"), options
            )
        oom.free()
    return Calibration()


def finished(run: Path) -> TrainedModel | None:
    """The run's model, if it is made."""
    folder = run / "model"
    if manifest.problem(folder, thorough=False) is not None:
        return None
    facts = json.loads((folder / "training.json").read_text("utf-8"))
    return TrainedModel(str(folder), manifest.read(folder)["digest"], **facts)
