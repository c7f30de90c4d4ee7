"""Mix models, select the mixture on validation data, and seal it as a model.

runs/<recipe>/merge-<digest>/scores.json   validation WERs of the mixtures that were tried
                             model/        the selected mixture, a model like that of a run
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipelines.features import derived, guards
from pipelines.features import pipeline as feature_pipeline
from pipelines.features.cache import FeatureCache
from pipelines.infra import environment, manifest
from pipelines.infra.errors import LabError
from pipelines.recipes import digest
from pipelines.recipes.runs import experiment_folder
from pipelines.recipes.settings import Recipe
from pipelines.training import model_card
from pipelines.training.merging import ingredients as parts
from pipelines.training.merging.ingredients import Ingredient
from pipelines.training.merging.selection import TARGET, Limits, Scores, best
from pipelines.training.run import lock_run
from pipelines.training.validation import validator
from pipelines.whisper import confidence
from pipelines.whisper import model as whisper_model
from pipelines.whisper.decoding import RowDecodingOptions
from pipelines.whisper.log_mel import FULL_S
from pipelines.whisper.model import ModelRef

logger = logging.getLogger(__name__)

CODE = "1"
"""Version of this code: raised when the same models would give another mixture."""
ALPHAS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Shares of the tuned weights that are tried for a single model."""
BASE = "base model"


@dataclass(frozen=True)
class Merge:
    """What is mixed, and from what the mixture is selected."""

    recipe: Recipe
    cache: FeatureCache
    guards: dict[str, FeatureCache]
    """Caches of the guard sets that have validation clips."""
    base: ModelRef
    ingredients: tuple[Ingredient, ...]
    origin: ModelRef
    """Model whose tokenizer, and for checkpoints recipe and facts, the mixture gets."""
    alphas: tuple[float, ...]
    newest_first: bool
    """The ingredients are the checkpoints of one run: the newest are averaged, not the best."""

    @property
    def identity(self) -> dict[str, Any]:
        """Return everything that decides the mixture."""
        limits = {name: [cache.digest, self.recipe.guards[name].max_increase] for name, cache in self.guards.items()}
        return {
            "base": whisper_model.identity(self.base),
            "ingredients": [one.sha256 for one in self.ingredients],
            "alphas": list(self.alphas),
            "cache": self.cache.digest,
            "guards": limits,
            "language": self.recipe.language,
            "max_new_tokens": derived.resolve(self.recipe, self.cache).evaluation.max_new_tokens,
            "newest_first": self.newest_first,
            "code.merge": CODE,
        }

    @property
    def digest(self) -> str:
        return digest(self.identity)


@dataclass(frozen=True)
class Merged:
    """A finished mixture."""

    uri: str
    facts: dict[str, Any]
    """`parents`, `alpha`, `selected` and `scores` (validation WER by mixture and set), as the manifest has them."""

    def as_dict(self) -> dict[str, Any]:
        """Return what `merge --json` prints."""
        return {"model_uri": self.uri, **self.facts}

    def __str__(self) -> str:
        scores, selected = self.facts["scores"], self.facts["selected"]
        names = list(scores[BASE])
        lines = ["validation WER".ljust(26) + "".join(name.rjust(14) for name in names)]
        for label, wers in scores.items():
            mark = "  <- selected" if label == selected else ""
            lines.append(f"  {label:<24}" + "".join(f"{wers[name]:14.3f}" for name in names) + mark)
        if broken := self.facts["violated"]:
            lines.append(f"warning: no mixture keeps {', '.join(broken)}: the one that violates least was selected")
        return "\n".join([*lines, f"model {self.uri}"])


def plan(
    recipe: Recipe,
    cache: FeatureCache,
    models: Sequence[str],
    *,
    runs: str | Path = "",
    alphas: Sequence[float] = (),
    last: int = 0,
) -> Merge:
    """Return what is to be mixed; raise LabError, in one line, for models that cannot be mixed.

    With `last` the newest checkpoints of the run of the only model are mixed. `alphas` are the shares of the tuned
    weights to try beside those of the base model; by default ALPHAS for one model, 1 for several.
    """
    base = whisper_model.resolve(recipe.model.base)
    if last and len(models) != 1:
        raise LabError(f"--last takes the folder of one run, got {len(models)} models: name one")
    tuned = parts.of_models(models)
    for one in tuned:
        parts.refuse_other_base(one.ref, base, cache)
    chosen = tuned
    if last:
        chosen = parts.of_checkpoints(tuned[0].ref.folder.parent, last)
    caches = {name: feature_pipeline.guard_cache(recipe, name, cache, runs=runs) for name in recipe.guards}
    for name in [name for name, clips in caches.items() if not len(clips.split(TARGET))]:
        logger.info(f"note: the guard {name} has no validation clips, so it does not select; evaluate scores it")
        del caches[name]
    tried = tuple(sorted({*alphas})) or (ALPHAS if len(chosen) == 1 else (1.0,))
    return Merge(recipe, cache, caches, base, tuple(chosen), tuned[0].ref, tried, bool(last))


def run(job: Merge, runs: str | Path = "") -> Merged:
    """Score the mixtures, select one and seal it; a finished mixture is returned, and an interrupted call continues."""
    folder = experiment_folder(job.recipe, runs) / f"merge-{job.digest}"
    folder.mkdir(parents=True, exist_ok=True)
    with lock_run(folder):
        return _run(job, folder)


def _run(job: Merge, folder: Path) -> Merged:
    model = folder / "model"
    if manifest.problem(model) is None:
        logger.info(f"this mixture is finished: {model}")
        return Merged(str(model), manifest.read(model)["merge"])
    environment.keep_freed_memory()
    scores = Scores.of(folder, lambda label, build: _measure(job, build(), is_base=label == BASE))
    base_wers = scores.of_mixture(BASE, lambda: whisper_model.load(job.base))
    limits = Limits(base_wers, {name: job.recipe.guards[name].max_increase for name in job.guards})
    mixer = _Mixer(job)
    subset = _select_subset(job, mixer, scores, limits)
    candidates = {_label(job, subset, alpha): (subset, alpha) for alpha in job.alphas}
    wers = {
        label: base_wers if alpha == 0 else scores.of_mixture(label, lambda pick=(subset, alpha): mixer.build(*pick))
        for label, (subset, alpha) in reversed(candidates.items())
    }
    selected = best(wers.items(), limits)
    facts = {
        "parents": [ingredient.lineage for ingredient in candidates[selected][0]],
        "alpha": candidates[selected][1],
        "selected": selected,
        "scores": scores.wers | wers,
        "violated": [
            name for name, most in limits.max_increase.items() if wers[selected][name] > base_wers[name] + most
        ],
    }
    subset, alpha = candidates[selected]
    mixed = [job.origin] if job.newest_first else [one.ref for one in subset]
    _seal(job, model, mixer.build(subset, alpha), mixed, facts, wers[selected])
    return Merged(str(model), facts)


def _select_subset(job: Merge, mixer: _Mixer, scores: Scores, limits: Limits) -> tuple[Ingredient, ...]:
    """Return the ingredients to average: the first k of the best order, for the k that is best on validation.

    Models are ordered by their validation WER, checkpoints from the newest back.
    """
    order = list(job.ingredients)
    if len(order) == 1:
        return tuple(order)
    if not job.newest_first:
        single = {one: scores.of_mixture(_label(job, (one,)), lambda one=one: mixer.build((one,))) for one in order}
        order.sort(key=lambda one: (limits.excess(single[one]), single[one][TARGET]))
    prefixes = {_label(job, tuple(order[:k])): tuple(order[:k]) for k in range(1, len(order) + 1)}
    wers = {
        label: scores.of_mixture(label, lambda subset=subset: mixer.build(subset)) for label, subset in prefixes.items()
    }
    return prefixes[best(wers.items(), limits)]


def _label(job: Merge, subset: Sequence[Ingredient], alpha: float = 1.0) -> str:
    if len(job.ingredients) == 1:
        return f"alpha {alpha:g}"
    names = " + ".join(str(job.ingredients.index(one) + 1) for one in subset)
    what = "checkpoints" if job.newest_first else "models"
    return f"{what} {names}" + (f", alpha {alpha:g}" if alpha != 1 else "")


class _Mixer:
    """Builds mixtures. The weights of the base model and of the last average stay in memory."""

    def __init__(self, job: Merge):
        self.job, self.subset, self.average = job, (), {}
        self.base: dict[str, Any] = {}

    def build(self, subset: tuple[Ingredient, ...], alpha: float = 1.0) -> Any:
        """Return Whisper with the average of `subset`, interpolated with the base model by the share `alpha`."""
        job = self.job
        if subset != self.subset:
            self.average = parts.average(one.weights(job.base) for one in subset)
            self.subset = subset
        weights = self.average
        if alpha != 1:
            self.base = self.base or whisper_model.load(job.base).state_dict()
            weights = parts.interpolate(self.base, weights, alpha)
        model = whisper_model.load(job.origin)
        model.load_state_dict(weights)
        return model


def _measure(job: Merge, model: Any, *, is_base: bool) -> dict[str, float]:
    """Return the WER of a model on the validation clips of the target and of each guard."""
    model = model.to(environment.detect().device)
    full_context = (job.base if is_base else job.origin).context == "full"
    sets = {TARGET: (job.recipe, job.cache)}
    sets |= {name: (guards.recipe_of(job.recipe, name), cache) for name, cache in job.guards.items()}
    wers = {}
    for name, (recipe, cache) in sets.items():
        processor = whisper_model.load_processor(job.origin, recipe.language)
        validate = validator(derived.resolve(recipe, cache), cache, processor, full_context)
        wers[name] = round(validate(model)["wer"], 6)
    return wers


def inherited(mixed: Sequence[ModelRef]) -> dict[str, Any]:
    """Return the facts that a mixture has from the models in it: the shortest `context_s`, the rest from the first."""
    first = mixed[0].facts
    names = ("base", "cache", "context", "quantisation", "language", "base_model", "data", "machine", "versions")
    longest = [one.facts["context_s"] for one in mixed if "context_s" in one.facts]
    return {
        **{name: first[name] for name in names if name in first},
        **({"context_s": min(longest)} if longest else {}),
        **({"windows": first["windows"]} if all(one.facts.get("windows") for one in mixed) else {}),
    }


def _seal(
    job: Merge, folder: Path, model: Any, mixed: Sequence[ModelRef], merge: dict[str, Any], wers: dict[str, float]
) -> None:
    """Write and seal the model of a mixture: weights, tokenizer, calibration, recipe, card and lineage."""
    recipe, origin = derived.resolve(job.recipe, job.cache), mixed[0]
    context = job.base.context if merge["alpha"] == 0 else origin.context
    shutil.rmtree(folder, ignore_errors=True)
    processor = whisper_model.load_processor(origin, recipe.language)
    whisper_model.save(model, processor, folder)
    options = RowDecodingOptions(
        recipe.language,
        recipe.evaluation.max_new_tokens,
        full_context=context == "full",
        batch_frames=recipe.evaluation.batch_frames,
    )
    rows = job.cache.split("validation")
    calibration = confidence.calibrate(model, processor, job.cache, rows, options)
    shutil.copyfile(origin.folder / "recipe.json", folder / "recipe.json")
    training = json.loads((origin.folder / "training.json").read_text("utf-8"))
    validation = {"step": training["best_step"], "eval_wer": wers[TARGET]}
    manifest.write_json(folder / "training.json", {**training, "validation": validation})
    facts = {
        "digest": job.digest,
        "name": f"{job.recipe.name}-merge-{job.digest}",
        **{name: value for name, value in inherited(mixed).items() if name != "windows" or merge["alpha"] > 0},
        **({"context": context, "context_s": float(FULL_S)} if merge["alpha"] == 0 else {}),
        "confidence": calibration.as_dict(),
        "merge": merge,
    }
    model_card.write(folder, facts)
    manifest.seal(folder, kind="model", made=datetime.now(UTC).isoformat(timespec="milliseconds"), **facts)
