"""Turn the best checkpoint of a run into its model: weights, confidence calibration, facts, card and manifest."""

from __future__ import annotations

import contextlib
import shutil
from datetime import UTC, datetime
from typing import Any

from pipelines.features.cache import FeatureCache
from pipelines.infra import manifest, redact
from pipelines.recipes.settings import Recipe
from pipelines.training import adapters, components, distillation, model_card
from pipelines.training.callbacks import oom
from pipelines.training.callbacks.progress import history_of, seconds_of
from pipelines.training.run import TrainedModel, TrainingRun, finished_model
from pipelines.whisper import bases, confidence, lineage
from pipelines.whisper import model as whisper_model
from pipelines.whisper.confidence import Calibration
from pipelines.whisper.decoding import RowDecodingOptions
from pipelines.whisper.log_mel import FULL_S


def finish(run: TrainingRun, trainer: Any) -> TrainedModel:
    """Write the best weights of a trainer that is done as the run's model, and seal it."""
    folder = run.folder / "model"
    weights = run.checkpoints / f"checkpoint-{trainer.state.best_global_step}"
    manifest.require_complete(
        weights, "the best checkpoint", "Run the same command again: it continues before that checkpoint"
    )
    model = adapters.load_checkpoint(weights, run.start)
    components.set_decoding(run.recipe, model)
    shutil.rmtree(folder, ignore_errors=True)
    whisper_model.save(model, trainer.processing_class, folder)
    bases.finish_tuned(folder, run.base.folder)
    calibration = _calibrate(run, model, trainer)
    manifest.write_json(folder / "training.json", _training_facts(trainer.state))
    manifest.write_json(folder / "recipe.json", redact.redact_settings(run.recipe.model_dump(mode="json")))
    facts = _manifest_facts(run, calibration)
    model_card.write(folder, facts)
    manifest.seal(folder, kind="model", made=datetime.now(UTC).isoformat(timespec="milliseconds"), **facts)
    return finished_model(run.folder)


def _training_facts(state: Any) -> dict[str, Any]:
    """Return the content of training.json, the fields of TrainedModel."""
    history, best = history_of(state), state.best_global_step
    return {
        "best_step": best,
        "validation": next(row for row in history if row["step"] == best and "eval_wer" in row),
        "history": history,
        "seconds": seconds_of(history),
    }


def _manifest_facts(run: TrainingRun, calibration: Calibration) -> dict[str, Any]:
    recipe, cache, base = run.recipe, run.cache, run.base
    return {
        "digest": run.digest,
        "name": f"{recipe.name}-{run.digest}",
        "base": lineage.base_of(base),
        "cache": cache.digest,
        "context": recipe.training.context,
        "context_s": context_s(recipe, cache),
        **({"windows": _window_facts(recipe)} if recipe.training.window_share else {}),
        "confidence": calibration.as_dict(),
        "quantisation": base.quantisation,
        "language": recipe.language,
        **model_card.facts_of(recipe, cache, base),
        **({"derived": dict(run.derived)} if run.derived else {}),
        **({"fork": run.fork.lineage} if run.fork else {}),
        **({"teacher": distillation.lineage(base)} if recipe.distillation.teacher else {}),
    }


def _window_facts(recipe: Recipe) -> dict[str, Any]:
    """Return how the windows of 30 s looked that the model was trained on: share, fill, timestamps and prompt."""
    prefix = "training.window_"
    settings = recipe.settings("training").items()
    return {name.removeprefix(prefix): value for name, value in settings if name.startswith(prefix)}


def context_s(recipe: Recipe, cache: FeatureCache) -> float:
    """Return the longest input of training in seconds: the longest clip, or 30 s with windows or full context.

    Clips without speech do not count: a longer window of speech needs to be trained on speech.
    """
    if recipe.training.context == "full" or recipe.training.window_share:
        return float(FULL_S)
    training = cache.rows.iloc[cache.split("train")]
    return float(training["duration_s"][training["text"] != ""].max())


def _calibrate(run: TrainingRun, model: Any, trainer: Any) -> Calibration:
    """Fit the confidence on the validation split, on the CPU if the device runs out of memory."""
    import torch

    recipe = run.recipe
    options = RowDecodingOptions(
        recipe.language,
        recipe.evaluation.max_new_tokens,
        full_context=recipe.training.context == "full",
        batch_frames=oom.ValidationBatch(run.folder, recipe.evaluation.batch_frames).frames,
    )
    rows = run.cache.split("validation")
    for device in (trainer.args.device, "cpu"):
        with contextlib.suppress(torch.OutOfMemoryError):
            return confidence.calibrate(model.to(device), trainer.processing_class, run.cache, rows, options)
        oom.free()
    return Calibration()
