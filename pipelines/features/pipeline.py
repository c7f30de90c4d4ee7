"""The stages as the notebooks and commands call them: each takes a recipe and a URI, and ends with the next URI.

    01  features(recipe)             -> FeatureCache     cache.uri
    02  train(recipe, cache)         -> TrainedModel     model.uri
        distil(recipe, cache)        -> the same of a student, after its teacher where there is none yet
        scores(recipe, cache, model.uri) -> the base model's and the tuned model's EvalReport
    03  transcriber(recipe, model_uri) -> Transcriber

What a stage made is noted in `runs/<recipe>/stages.json`, so that a later stage (and `make run`) finds it.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.features import build
from pipelines.features import cache as caches
from pipelines.features.cache import FeatureCache
from pipelines.features.curation import corpus, label_errors
from pipelines.features.curation.gate import Gate
from pipelines.features.curation.selection import Selection
from pipelines.features.sources import SPLITS, Example, Source
from pipelines.features.sources.registry import open_source
from pipelines.infra import environment, manifest, stores
from pipelines.infra.errors import LabError
from pipelines.infra.parallel import distributed
from pipelines.infra.stores import hopsworks
from pipelines.recipes import digest
from pipelines.recipes import runs as recipe_runs
from pipelines.recipes.runs import clip_progress_bar, read_stages, record_stage
from pipelines.recipes.settings import PartSettings, Recipe
from pipelines.speech import audio
from pipelines.whisper import model as whisper_model
from pipelines.whisper import tokens
from pipelines.whisper.model import ModelRef, _vocabulary_sha256, processor

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)


MAX_DURATION_S = 30.0
"""Longer samples are not played: nothing longer is ever trained on."""
_SOURCE = "source."
"""Prefix of what a source tells of itself, within a cache's identity."""


def features_identity(
    recipe: Recipe, source: Mapping[str, Any], processor: Any, runs: str | Path = ""
) -> dict[str, Any]:
    """Flat: everything that decides the rows and frames of a cache; `library.` fields are told, not enforced.

    `source` is what the source tells of itself: `Source.identity()`. `runs` is where a label model of the lab's lies.
    """
    settings = recipe.settings("features")
    for name in ("shard_clips", "workers"):  # how the work is cut and shared out changes no row
        settings.pop(f"features.{name}")
    return {
        **settings,
        "language": recipe.language,
        "features.n_mels": processor.feature_extractor.feature_size,
        "features.vocabulary": _vocabulary_sha256(processor),
        "code.cache": caches.FORMAT,
        **corpus.identity(recipe, lambda: label_model(recipe, runs)),
        **_source_settings(recipe),
        **{f"{_SOURCE}{name}": value for name, value in source.items()},
        **{f"library.{name}": importlib.metadata.version(name) for name in ("transformers", "soxr", "soundfile")},
    }


def run(
    recipe: Recipe,
    *,
    runs: str | Path = "",
    cache_uri: str = "",
    publish: str = "",
    ray_address: str = "",
    on_clips: Callable[[int, int], None] = lambda n, of: None,
) -> FeatureCache:
    """Stage 01: the recipe's feature cache; made, finished if it was cut off, or opened if it is there.

    With `cache_uri` the cache lies in that folder: a finished one is opened if it is what the recipe asks for, and
    refused, naming the fields that differ, if it is not. One on the Hub or on Hopsworks is fetched. With `publish`
    the finished cache is copied to that URI. With `ray_address` the machines of a Ray cluster extract (cluster.py).
    `on_clips` is told of each block of clips that is done how many it held, and how many there are in all; 0 where the
    source cannot tell before it is read.
    """
    with record_stage(recipe, runs, "features") as note:
        prepared, source = processor(recipe), open_source(recipe.source, recipe.language)
        identity = features_identity(recipe, source.identity(), prepared, runs)
        folder = _folder(cache_uri) if cache_uri else _cache_folder(runs, identity)
        if caches.is_finished(folder):
            cache = caches.open_cache(folder, identity)
            logger.info(f"this cache is at hand, nothing is extracted again: {cache.uri}")
        else:
            reuse = _newest_first((environment.runs_folder(runs) / "features").glob("*/"))
            cache = _extract(recipe, source, prepared, folder, identity, reuse, runs, ray_address, on_clips)
        note |= {"cache_uri": cache.uri, "digest": cache.digest, "counts": cache.counts, "bytes": cache.bytes}
        note["curation"] = cache.curation
    if missing := [split for split in SPLITS if not len(cache.split(split))]:
        logger.info(
            f"note: no {' and no '.join(missing)} clips: training selects by validation and ends with the test. "
            "Add a `split` column, or recordings of more speakers"
        )
    if publish:
        with record_stage(recipe, runs, "publication") as note:
            note["cache_uri"] = _publish(cache, publish)
    return cache


def open_cache(recipe: Recipe, cache_uri: str = "", *, runs: str | Path = "") -> FeatureCache:
    """The cache that stage 02 trains on: `cache_uri`, else what stage 01 noted last. A stale one is refused.

    One that is not on this machine's own disk is fetched, and verified, into the lab's cache folder.
    """
    uri = cache_uri or read_stages(recipe, runs).get("features", {}).get("cache_uri")
    if not uri:
        raise LabError(
            f"no feature cache for recipe {recipe.name}: run 01_feature_pipeline first "
            f"(python -m pipelines features --recipe {recipe.name}), or give its URI as cache_uri"
        )
    with distributed.local_main_process_first():
        folder = stores.at_hand(uri)
        identity = features_identity(recipe, _source_identity(recipe, folder), processor(recipe), runs)
        return caches.open_cache(folder, identity)


def samples(recipe: Recipe, n: int = 5, split: str = "test") -> list[Example]:
    """`n` examples of a split, spread over (the first 2,000 of) it, so that several speakers are heard.

    What cannot be decoded is passed over: it is for looking and listening, and the cache lists what it rejected.
    """
    examples = list(islice(open_source(recipe.source, recipe.language).examples((split,)), 2_000))
    step = max(1, len(examples) // n)
    spread = [example for start in range(step) for example in examples[start::step]]
    return list(islice(filter(_decodes, spread), n))


def _decodes(example: Example) -> bool:
    try:
        audio.decode(example.audio, MAX_DURATION_S)
    except audio.AudioError:
        return False
    return True


def label_model(recipe: Recipe, runs: str | Path = "") -> ModelRef:
    """The model that is asked for label errors. LabError where a recipe's own is named, and there is none."""
    wanted, of_run = recipe.curation.label_model or recipe.model.base, "run:"
    if not wanted.startswith(of_run):
        return whisper_model.resolve(wanted)
    name, seed = wanted.removeprefix(of_run), recipe.training.seed
    found = recipe_runs.newest_model_of_seed(environment.runs_folder(runs) / name, seed)
    if found is None:
        raise LabError(
            f"curation.label_model is {wanted!r}, and no finished run of {name} with training.seed={seed} is on this "
            f"machine: python -m pipelines run --recipe {name} --set training.seed={seed}"
        )
    return whisper_model.resolve(str(found))


def _source_identity(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """What the recipe's source tells of itself; where it is not at hand, what the cache in `folder` noted of it.

    Training wants the cache, not the gigabytes that it was made of: on another machine the note stands in for them,
    and the source's settings are compared all the same. A source that lies here but cannot be read is an error.
    """
    try:
        return open_source(recipe.source, recipe.language).identity()
    except LabError as error:
        if recipe.source.path and Path(recipe.source.path).expanduser().exists():
            raise
        noted = (manifest.read(folder) or {}).get("identity", {})
        logger.info(f"note: the source is not at hand ({error}); what the cache noted of it is taken")
        return {name.removeprefix(_SOURCE): value for name, value in noted.items() if name.startswith(_SOURCE)}


def _source_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings that choose from a corpus, where they are not at their defaults; where it lies chooses nothing."""
    told = recipe.changed("source")
    if parts := told.get("source.parts"):
        told["source.parts"] = [_part_settings(part) for part in parts]
    places = ("source.path", "source.sentences", "source.kind")
    return {f"settings.{name}": value for name, value in told.items() if name not in places}


def _part_settings(part: dict[str, Any]) -> dict[str, Any]:
    """Settings that came later are told where they are set: the digests of older mixes stay as they are."""
    plain = PartSettings(name="plain").model_dump(mode="json")
    later = [name for name in ("faults", "men", "own_names") if part[name] == plain[name]]
    return {name: value for name, value in part.items() if name not in ("path", "sentences", *later)}


def _extract(
    recipe: Recipe,
    source: Source,
    processor: Any,
    folder: Path,
    identity: dict[str, Any],
    reuse: list[Path],
    runs: str | Path,
    ray_address: str,
    on_clips: Callable[[int, int], None],
) -> FeatureCache:
    settings, curation = recipe.features, recipe.curation
    gate = Gate(
        tokens.labeller(processor, recipe.language),
        identity["features.n_mels"],
        settings.min_duration_s,
        settings.max_duration_s,
        settings.min_peak,
        corpus.limits(curation),
        curation.full_stop,
    )
    held_out = corpus.load_held_out(curation.held_out, gate.n_mels)
    before = corpus.survey(curation, source, held_out)
    n_left = before.counts[0].before - len(before.dropped) if before else 0

    def finish(cache: FeatureCache, rejected: list[dict[str, str]]) -> Selection:
        return corpus.finish(
            curation, cache, rejected, before, held_out, lambda rows: _hear(recipe, cache, rows, runs), gate.label
        )

    with clip_progress_bar("log-mel", n_left or None) as step:

        def done(n: int) -> None:
            step(n)
            on_clips(n, n_left)

        return build.build(
            folder,
            corpus.left(source, before),
            gate.admit,
            identity,
            shard_clips=settings.shard_clips,
            curate=finish,
            workers=settings.workers,
            ray_address=ray_address,
            reuse=reuse,
            on_clips=done,
        )


def _hear(recipe: Recipe, cache: FeatureCache, rows: np.ndarray, runs: str | Path) -> list[str]:
    """What the label model hears in these rows of the cache."""
    ref, folder = label_model(recipe, runs), environment.runs_folder(runs) / "label_errors"
    logger.info(f"asking {ref.title} what it hears in {len(rows)} training clips")
    with clip_progress_bar("label errors", len(rows)) as step:
        return label_errors.heard(cache, rows, ref, recipe.language, recipe.evaluation, folder, on_clips=step)


def _newest_first(folders: Iterable[Path]) -> list[Path]:
    return sorted(folders, key=lambda folder: -folder.stat().st_mtime)


def _cache_folder(runs: str | Path, identity: dict[str, Any]) -> Path:
    """Caches are shared between recipes, and between sources that are one corpus, as an archive and its download are.

    Library versions stay out of the name, so that an upgrade keeps the cache.
    """
    lasting = {name: value for name, value in identity.items() if not name.startswith("library.")}
    return environment.runs_folder(runs) / "features" / f"{identity[f'{_SOURCE}kind']}-{digest(lasting)}"


def _folder(cache_uri: str) -> Path:
    """Where a cache lies, or is to lie: a path as it is, also on a drive; anything else is fetched."""
    return stores.at_hand(cache_uri) if stores.is_remote(cache_uri) else Path(cache_uri).expanduser().absolute()


def _publish(cache: FeatureCache, uri: str) -> str:
    """Copy a cache to `uri`; where LAB_FEATURE_GROUP names one, its rows go to that group of the Hopsworks project."""
    published = stores.open_store(uri).publish(cache.folder, uri)
    logger.info(f"published as {published}")
    if (group := os.environ.get("LAB_FEATURE_GROUP")) and uri.startswith("hopsworks://"):
        hopsworks.add_rows(published, cache.rows, group)
    return published
