"""Feature pipeline: from a recipe to a feature cache. The entry point of notebook 01, the CLI and the worker.

cache = pipeline.run(recipe)            build, resume or reopen the recipe's cache; cache.uri goes to training
cache = pipeline.open_cache(recipe)     the cache that training reads
examples = pipeline.samples(recipe)     a few examples to look at and listen to
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.features import availability, build, derived, guards, identity, rejections
from pipelines.features import cache as caches
from pipelines.features.build import BuildOptions
from pipelines.features.cache import FeatureCache
from pipelines.features.curation import corpus, label_errors, leaks
from pipelines.features.curation.clip_filter import ClipFilter
from pipelines.features.curation.held_out import held_out_parts, load_held_out
from pipelines.features.curation.selection import Selection
from pipelines.features.data_card import card
from pipelines.features.identity import label_model
from pipelines.features.sources import SPLITS, Example, NoAudio, Source, splits
from pipelines.features.sources.registry import open_source
from pipelines.infra import environment, stores
from pipelines.infra.errors import LabError
from pipelines.infra.parallel import distributed
from pipelines.infra.stores import hopsworks
from pipelines.recipes.base_settings import AUTO
from pipelines.recipes.commands import command
from pipelines.recipes.runs import clip_progress_bar, read_stages, record_stage
from pipelines.recipes.settings import Recipe
from pipelines.speech import audio
from pipelines.whisper import tokens
from pipelines.whisper.model import processor

if TYPE_CHECKING:
    import numpy as np

    from pipelines.whisper.model import ModelRef

logger = logging.getLogger(__name__)

SYNTHETIC = ("tour", "tour-english", "planted")
"""Kinds of sources whose speech is made on this machine, from nothing but the recipe."""
_SPEAKERS = {
    "": "in the source",
    "folder": "in a column `speaker`",
    "hub": "with source.speaker_column",
    "parquet": "with source.speaker_column",
    "aligned": "in the texts (`<v Anna>` in .vtt, a tier for each speaker in TextGrid, the participant in ELAN)",
}
"""Where speakers are named, by kind of source."""
MAX_SAMPLE_S = 30.0
"""Longer recordings are not shown as samples: no longer clip is trained on."""


def run(
    recipe: Recipe,
    *,
    runs: str | Path = "",
    cache_uri: str = "",
    publish: str = "",
    ray_address: str = "",
    on_clips: Callable[[int, int], None] = lambda n, total: None,
) -> FeatureCache:
    """Run stage 01: build the recipe's feature cache, resume an interrupted build, or open a finished one.

    With `cache_uri` the cache is stored in that folder, or fetched from the Hub or Hopsworks; a finished one must have
    the recipe's identity. With `publish` the finished cache is copied to that URI. With `ray_address` the machines of a
    Ray cluster extract the features. `on_clips` receives, for each finished shard, its number of clips and the total; 0
    if the source cannot be counted before it is read. Raises TooManyRejected, with the finished cache, if more than
    `features.max_rejected_share` of the clips cannot be used.
    """
    with record_stage(recipe, runs, "features") as record:
        cache = _open_or_build(recipe, identity.source_of(recipe, runs), runs, cache_uri, ray_address, on_clips)
        record |= {"cache_uri": cache.uri, "digest": cache.digest, "counts": cache.counts, "bytes": cache.bytes}
        record |= {"curation": cache.curation, "rejected": rejections.as_dict(cache)["rejected"]}
    _log_notes(recipe, cache)
    logger.info(f"clips to use: {splits.describe(cache.rows['split'])}")
    if summary := rejections.describe(cache):
        logger.info(summary)
    rejections.check_share(cache, recipe.features.max_rejected_share)
    if publish:
        with record_stage(recipe, runs, "publication") as record:
            record["cache_uri"] = publish_cache(cache, publish)
    for name in recipe.guards:
        guard_cache(recipe, name, cache, runs=runs)
    return cache


def _open_or_build(
    recipe: Recipe,
    source: Source,
    runs: str | Path,
    cache_uri: str = "",
    ray_address: str = "",
    on_clips: Callable[[int, int], None] = lambda n, total: None,
) -> FeatureCache:
    whisper_processor, source_identity = processor(recipe), source.identity()
    cache_identity = identity.cache_identity(recipe, source_identity, whisper_processor, runs)
    folder = _local_folder(cache_uri) if cache_uri else identity.cache_folder(runs, cache_identity)
    cache = _finished_cache(folder, cache_identity)
    if cache is None:
        extraction = _Extraction(recipe, source, _clip_filter(recipe, whisper_processor), runs, on_clips)
        cache = extraction.run(folder, cache_identity, source_identity, ray_address)
    if not stores.is_remote(cache_uri):
        card.add(cache.folder, recipe)
    return cache


def guard_cache(recipe: Recipe, name: str, cache: FeatureCache, *, runs: str | Path = "") -> FeatureCache:
    """Return the cache of a guard's validation and test clips; build it if there is none.

    Raises LabError if it has no test clips, or if training rows of `cache` share something with it.
    """
    settings, guard = guards.recipe_of(recipe, name), recipe.guards[name]

    def find(model: str, setting: str) -> ModelRef:
        return identity.find_model(recipe, model, setting, runs)

    workers = recipe.features.workers
    source = guards.GuardSource(open_source(guard.source, settings.language, find, workers), guard.join_s)
    logger.info(f"guard {name}: language {settings.language}, source {guard.source.kind}")
    clips = _open_or_build(settings, source, runs)
    if not len(clips.split("test")):
        raise LabError(
            f"the guard {name} has no test clips: name a source with a test split, or remove [guards.{name}]"
        )
    guards.refuse_leaks(recipe, cache, name, clips)
    return clips


def _log_notes(recipe: Recipe, cache: FeatureCache) -> None:
    """Log what the splits cannot be used for, and what decoding would cut."""
    _log_cut_references(recipe, cache)
    if missing := [split for split in SPLITS if not len(cache.split(split))]:
        logger.info(
            f"note: no {' and no '.join(missing)} clips: training selects by validation and ends with the test. "
            "Add a `split` column, or more recordings of other sentences"
        )
    if note := leaks.shared_speakers(cache.rows):
        logger.info(f"note: {note}")
    elif not cache.rows["speaker"].any():
        logger.info(
            "note: no clip names its speaker: the same voices may be in train and test, and scores then say nothing "
            f"about other voices. Name them {_SPEAKERS.get(recipe.source.kind, _SPEAKERS[''])} if you know them"
        )


def _finished_cache(folder: Path, cache_identity: dict[str, Any]) -> FeatureCache | None:
    """Return the cache in `folder`, or None if it is to be built: it is unfinished, or a file of it is damaged."""
    if not caches.is_finished(folder):
        return None
    try:
        cache = caches.open_cache(folder, cache_identity)
    except caches.DamagedCache as error:
        logger.info(f"{error}. That is done now")
        return None
    logger.info(f"feature cache found, nothing is extracted again: {cache.uri}")
    return cache


def open_cache(recipe: Recipe, cache_uri: str = "", *, runs: str | Path = "") -> FeatureCache:
    """Open the cache that stage 02 trains on: `cache_uri`, else the one below `runs` that fits the recipe.

    Stage 01 records its cache under the recipe's name; after another source or other settings an earlier one may fit.
    A cache on another machine is fetched into the lab's cache folder and verified. Raises LabError if there is none,
    StaleCache if it does not have the recipe's identity.
    """
    uri = cache_uri or read_stages(recipe, runs).get("features", {}).get("cache_uri")
    if cache_uri and not _is_here(cache_uri):
        raise _not_here(cache_uri)
    if not uri and not any((environment.runs_folder(runs) / "features").glob("*/")):
        raise _no_cache(recipe, runs)
    with distributed.local_main_process_first():
        folder = stores.local_folder(uri) if uri and _is_here(uri) else None
        missing = _not_here(uri) if uri else _no_cache(recipe, runs)
        try:
            source = identity.source_identity(recipe, folder, runs)
        except LabError:
            if folder is None:
                raise missing from None
            raise
        required = identity.cache_identity(recipe, source, processor(recipe), runs)
        matching = identity.cache_folder(runs, required)
        if not cache_uri and matching != folder and caches.is_finished(matching):
            logger.info(f"the feature cache that fits this recipe: {matching}")
            folder = matching
        if folder is None:
            raise missing
        cache = caches.open_cache(folder, required)
    _log_cut_references(recipe, cache, ("validation",))  # the test is scored with a report, which says the same
    return cache


def _log_cut_references(recipe: Recipe, cache: FeatureCache, splits: tuple[str, ...] = ("validation", "test")) -> None:
    limit = recipe.evaluation.max_new_tokens
    for split in splits:
        if limit != AUTO and (note := derived.cut_references(cache, split, limit)):
            logger.info(f"note: {note}")


def _not_here(uri: str) -> LabError:
    return LabError(
        f"the feature cache {uri} is not on this machine. Notebooks on Colab and Kaggle have a machine each: give "
        "both the same `runs` folder on Drive, or `publish` in notebook 01 and its URI here"
    )


def _no_cache(recipe: Recipe, runs: str | Path) -> LabError:
    return LabError(
        f"no feature cache for recipe {recipe.name}: run 01_feature_pipeline first "
        f"({command('features', recipe=recipe, runs=runs)}), or give its URI as cache_uri"
    )


def open_or_make_cache(recipe: Recipe, cache_uri: str = "", *, runs: str | Path = "") -> FeatureCache:
    """Open the cache that stage 02 trains on, as `open_cache` does. On a machine without it, synthetic speech is made
    again, with the same digest."""
    uri = cache_uri or read_stages(recipe, runs).get("features", {}).get("cache_uri")
    if (uri and _is_here(uri)) or recipe.source.kind not in SYNTHETIC:
        return open_cache(recipe, cache_uri, runs=runs)
    logger.info(f"{uri or 'the feature cache'} is not on this machine: its speech is synthetic and is made here")
    return run(recipe, runs=runs)


def samples(recipe: Recipe, n: int = 5, split: str = "test") -> list[Example]:
    """Return `n` examples of a split that can be decoded, spread over its first 2,000 to cover several speakers."""
    examples = list(islice(identity.source_of(recipe).examples((split,)), 2_000))
    step = max(1, len(examples) // n)
    spread = [example for start in range(step) for example in examples[start::step]]
    return list(islice(filter(_can_be_decoded, spread), n))


def publish_cache(cache: FeatureCache, uri: str) -> str:
    """Copy a cache to `uri` and return its published URI.

    On Hopsworks its rows are also added to the feature group that LAB_FEATURE_GROUP names.
    """
    card.add(cache.folder)
    published = stores.open_store(uri).publish(cache.folder, uri)
    logger.info(f"published as {published}")
    if (group := os.environ.get("LAB_FEATURE_GROUP")) and uri.startswith("hopsworks://"):
        hopsworks.add_rows(published, cache.rows, group)
    return published


@dataclass(frozen=True)
class _Extraction:
    """The build of one recipe's cache: curation before, during and after the extraction of features."""

    recipe: Recipe
    source: Source
    clip_filter: ClipFilter
    runs: str | Path
    on_clips: Callable[[int, int], None]

    def run(
        self, folder: Path, cache_identity: dict[str, Any], source_identity: dict[str, str], ray_address: str
    ) -> FeatureCache:
        settings, curation = self.recipe.features, self.recipe.curation
        availability.check_present(self.recipe, self.source)
        held_out = load_held_out(curation.held_out, self.clip_filter.n_mels)
        survey = corpus.survey(curation, self.source, held_out)
        n_clips = survey.counts[0].before - len(survey.dropped) if survey else 0

        def curate(cache: FeatureCache, rejected: list[dict[str, str]]) -> Selection:
            availability.check_unchanged(self.recipe, self.source, source_identity, rejected, self.runs)
            parts = partial(held_out_parts, self.source)
            return corpus.finish(curation, cache, rejected, survey, held_out, self._label_errors(cache), parts)

        with clip_progress_bar("log-mel", n_clips or None) as advance:

            def report(n: int) -> None:
                advance(n)
                self.on_clips(n, n_clips)

            earlier = (environment.runs_folder(self.runs) / "features").glob("*/")
            newest_first = tuple(sorted(earlier, key=lambda path: -path.stat().st_mtime))
            options = BuildOptions(settings.shard_clips, settings.workers, ray_address, newest_first)
            examples, create_clip = corpus.selected(self.source, survey), self.clip_filter.create_clip
            return build.build(folder, examples, create_clip, cache_identity, options, curate=curate, on_clips=report)

    def _label_errors(self, cache: FeatureCache) -> corpus.LabelErrors:
        return corpus.LabelErrors(lambda rows: self._transcribe(cache, rows), self.clip_filter.label)

    def _transcribe(self, cache: FeatureCache, rows: np.ndarray) -> list[str]:
        """Transcribe rows of the cache with the label model."""
        recipe, folder = self.recipe, environment.runs_folder(self.runs) / "label_errors"
        ref, settings = label_model(recipe, self.runs), derived.resolve(recipe, cache).evaluation
        logger.info(f"transcribing {len(rows)} training clips with {ref.title} to find label errors")
        with clip_progress_bar("label errors", len(rows)) as advance:
            return label_errors.transcribe(cache, rows, ref, recipe.language, settings, folder, on_clips=advance)


def _clip_filter(recipe: Recipe, processor: Any) -> ClipFilter:
    settings = recipe.features
    return ClipFilter(
        tokens.labeller(processor, recipe.language),
        processor.feature_extractor.feature_size,
        settings.min_duration_s,
        settings.max_duration_s,
        settings.min_peak,
        corpus.limits(recipe.curation),
        recipe.curation.full_stop,
        recipe.curation.marks == "remove",
        recipe.curation.non_speech_share > 0,
    )


def _can_be_decoded(example: Example) -> bool:
    try:
        if isinstance(sound := example.audio, NoAudio):
            return False
        audio.decode(sound, MAX_SAMPLE_S)
    except audio.AudioError:
        return False
    return True


def _is_here(uri: str) -> bool:
    """Return True for a remote URI, and for a path that exists."""
    return stores.is_remote(uri) or Path(uri).expanduser().exists()


def _local_folder(cache_uri: str) -> Path:
    """Return the folder of a cache that exists or is to be built: a path as it is, a remote URI fetched."""
    return stores.local_folder(cache_uri) if stores.is_remote(cache_uri) else Path(cache_uri).expanduser().absolute()
