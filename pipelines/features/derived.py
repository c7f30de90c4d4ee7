"""Derive the settings that are `auto` from the corpus: a recipe that fits twenty clips as well as ten thousand.

    training.steps              EPOCHS passes over the training clips, within STEPS
    training.eval_every         VALIDATIONS validations, spread over the steps
    training.patience           a third of the validations, at least MIN_PATIENCE
    training.warmup_steps       a tenth of the steps, at most MAX_WARMUP_STEPS
    evaluation.max_new_tokens   more tokens than anyone can say in the longest clip, see `token_limit`

The values depend on the cache alone, whose digest is part of a run's identity. No transcript of the test split is read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pipelines.features.cache import FeatureCache
from pipelines.infra.errors import LabError
from pipelines.recipes.base_settings import AUTO
from pipelines.recipes.settings import MAX_NEW_TOKENS, Recipe

EPOCHS = 6
STEPS = (100, 4_000)
"""Least and most steps."""
VALIDATIONS = 10
MIN_PATIENCE = 3
MAX_WARMUP_STEPS = 500
TOKENS_PER_S = 12
"""Twice the tokens that Swedish reading has in Whisper's vocabulary (5.0 to 5.8 per second)."""
SPARE_TOKENS = 16
PROMPT_TOKENS = 3
"""Tokens of a label before its text: language, task, no timestamps. The decoder gets them and does not write them."""


@dataclass(frozen=True)
class Derived:
    """A recipe without `auto`, and what was derived."""

    recipe: Recipe
    values: dict[str, int]
    """Setting to derived value; empty for a recipe whose settings are all explicit."""
    clips: int
    """Training clips."""

    def __str__(self) -> str:
        values = ", ".join(f"{name} {value:,}" for name, value in self.values.items())
        return f"derived from {self.clips:,} training clips: {values}"


def derive(recipe: Recipe, cache: FeatureCache) -> Derived:
    """Replace the settings of a recipe that are `auto`; explicit ones stay and count for the others.

    Raises LabError for a cache without training clips, if the steps are derived.
    """
    training, rows = recipe.training, cache.split("train")
    values: dict[str, Any] = {}

    def setting(name: str, value: int) -> int:
        explicit = getattr(training, name)
        if explicit != AUTO:
            return explicit
        values[f"training.{name}"] = value
        return value

    if not len(rows) and training.steps == AUTO:
        raise LabError(f"the cache {cache.folder} has no train clips to derive training.steps from: add some")
    per_epoch = math.ceil(math.ceil(len(rows) / training.batch_size) / training.accumulation)
    steps = setting("steps", min(max(EPOCHS * per_epoch, STEPS[0]), STEPS[1]))
    every = setting("eval_every", max(1, steps // VALIDATIONS))
    setting("patience", max(MIN_PATIENCE, math.ceil(steps / every) // 3))
    setting("warmup_steps", min(steps // 10, MAX_WARMUP_STEPS))
    if recipe.evaluation.max_new_tokens == AUTO:
        values["evaluation.max_new_tokens"] = token_limit(cache)
    return Derived(_with(recipe, values), values, len(rows))


def resolve(recipe: Recipe, cache: FeatureCache) -> Recipe:
    """Return the recipe of `derive`."""
    return derive(recipe, cache).recipe


def token_limit(cache: FeatureCache) -> int:
    """Return the most tokens that a transcript of this corpus may need, at most MAX_NEW_TOKENS.

    It follows from the duration of the longest clip, and from the longest transcript of train and validation, because
    some languages need more tokens per second. A repetition loop ends there.
    """
    rows = cache.rows
    most_spoken = TOKENS_PER_S * float(rows["duration_s"].max()) + SPARE_TOKENS
    longest_label = rows["label_count"][rows["split"] != "test"].max() - PROMPT_TOKENS
    return min(MAX_NEW_TOKENS, math.ceil(max(most_spoken, 1.25 * (0 if math.isnan(longest_label) else longest_label))))


def cut_references(cache: FeatureCache, split: str, max_new_tokens: int) -> str:
    """Return in one sentence how many transcripts of a split are longer than a decoder may write; empty if none is."""
    tokens = cache.rows["label_count"].to_numpy()[cache.split(split)] - PROMPT_TOKENS
    n = int((tokens > max_new_tokens).sum())
    if not n:
        return ""
    return (
        f"{n} of {len(tokens)} {split} transcripts have more tokens (up to {tokens.max()}) than "
        f"evaluation.max_new_tokens={max_new_tokens} allows, and what is cut counts as errors: "
        "set evaluation.max_new_tokens=auto"
    )


def cut_hypotheses(n: int, split: str) -> str:
    """Return in one sentence that `n` of the hypotheses of a split reached the limit of tokens; empty if none did."""
    if not n:
        return ""
    return (
        f"{n} {split} {'hypotheses were' if n > 1 else 'hypothesis was'} cut at evaluation.max_new_tokens: "
        "such a text repeats itself, or the limit is too low for these clips (auto fits it to them)"
    )


def _with(recipe: Recipe, values: dict[str, int]) -> Recipe:
    groups = {
        group: {name.partition(".")[2]: value for name, value in values.items() if name.startswith(f"{group}.")}
        for group in ("training", "evaluation")
    }
    return recipe.model_copy(
        update={group: getattr(recipe, group).model_copy(update=changed) for group, changed in groups.items()}
    )
