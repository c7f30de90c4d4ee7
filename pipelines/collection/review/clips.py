"""The clips of a review: the training clips of a recipe's cache that its model believes least, with their audio."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.collection.review import scores
from pipelines.collection.review.queue import Item
from pipelines.features import derived, identity, pipeline
from pipelines.features.sources import Example
from pipelines.infra import environment
from pipelines.infra.errors import LabError
from pipelines.recipes.runs import clip_progress_bar
from pipelines.recipes.settings import Recipe
from pipelines.whisper import model as whisper_model


@dataclass(frozen=True)
class Clips:
    """What a review starts with."""

    items: list[Item]
    model: str
    """Title of the model that judged the transcripts."""
    examples: dict[str, Example] = field(repr=False, default_factory=dict)
    """The source's examples of the items by id; their audio is read when it is played."""


def load(recipe: Recipe, runs: str | Path, model: str, count: int) -> Clips:
    """Build or open the recipe's cache, score its training clips, and return the `count` least believable ones.

    `model` judges the transcripts; empty: the recipe's base model. Raises LabError for a cache without training clips.
    """
    cache = pipeline.run(recipe, runs=runs)
    ref = whisper_model.resolve(model or recipe.model.base)
    settings, folder = derived.resolve(recipe, cache).evaluation, environment.runs_folder(runs) / "label_errors"
    if not (cache.rows["text"][cache.split("train")] != "").any():
        raise LabError(f"the cache {cache.folder} has no training clips with a transcript: there is nothing to review")
    with clip_progress_bar("judging transcripts", len(cache.split("train"))) as advance:
        found = scores.score(cache, ref, recipe.language, settings, folder, on_clips=advance)
    rows = cache.rows.iloc[found.rows]
    items = [Item(*clip) for clip in zip(rows["id"], rows["text"], found.heard, found.gap.tolist(), strict=True)]
    items = sorted(items, key=lambda item: (-item.score, item.id))[:count]
    return Clips(items, ref.title, {one.id: one for one in _examples(recipe, {item.id for item in items})})


def _examples(recipe: Recipe, ids: set[str]) -> Iterator[Example]:
    for example in identity.source_of(recipe).examples(("train",)):
        if example.id in ids:
            yield example
