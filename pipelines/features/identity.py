"""Identity of a feature cache: everything that decides its rows and frames, as a flat mapping.

The digest of the identity names the cache's folder; training refuses a cache whose identity differs from its recipe's.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.features import cache as caches
from pipelines.features.curation import corpus
from pipelines.features.sources import Source
from pipelines.features.sources.registry import open_source
from pipelines.infra import environment, manifest
from pipelines.infra.errors import LabError
from pipelines.recipes import digest, load, names
from pipelines.recipes import runs as recipe_runs
from pipelines.recipes.commands import command
from pipelines.recipes.data_settings import PartSettings
from pipelines.recipes.settings import Recipe
from pipelines.whisper import model as whisper_model
from pipelines.whisper.model import ModelRef, vocabulary_sha256

logger = logging.getLogger(__name__)

_SOURCE = "source."
"""Prefix of the source's own identity fields."""
_NAMES_OF_FILES = (
    *("path", "sentences", "allow_missing_files", "exclude"),
    *("aligner", "label_model", "agreement_model", "language_model"),
)
"""Settings of a source that say where its files and models are; the source's identity has their content."""


def cache_identity(recipe: Recipe, source: Mapping[str, Any], processor: Any, runs: str | Path = "") -> dict[str, Any]:
    """Return the identity of a recipe's cache; `library.*` versions are recorded, a mismatch only warns.

    `source` is `Source.identity()`. `runs` is the folder in which a label model `run:<recipe>` is looked up.
    """
    settings = recipe.settings("features")
    for name in ("shard_clips", "workers", "max_rejected_share"):  # they change no row
        settings.pop(f"features.{name}")
    return {
        **settings,
        "language": recipe.language,
        "features.n_mels": processor.feature_extractor.feature_size,
        "features.vocabulary": vocabulary_sha256(processor),
        "code.cache": caches.FORMAT,
        **corpus.identity(recipe, lambda: label_model(recipe, runs)),
        **_source_settings(recipe, source),
        **{f"{_SOURCE}{name}": value for name, value in source.items()},
        **{f"library.{name}": importlib.metadata.version(name) for name in ("transformers", "soxr", "soundfile")},
    }


def cache_folder(runs: str | Path, identity: dict[str, Any]) -> Path:
    """Return `<runs>/features/<source kind>-<digest>`, shared by all recipes with the same identity.

    Library versions are left out of the digest, so that an upgrade keeps the cache.
    """
    lasting = {name: value for name, value in identity.items() if not name.startswith("library.")}
    return environment.runs_folder(runs) / "features" / f"{identity[f'{_SOURCE}kind']}-{digest(lasting)}"


def label_model(recipe: Recipe, runs: str | Path = "") -> ModelRef:
    """Return the model that finds label errors: `curation.label_model`, else the recipe's base model.

    `run:<recipe>` is the newest finished model of that recipe and this recipe's seed. Raises LabError if it is missing.
    """
    return find_model(recipe, recipe.curation.label_model or recipe.model.base, "curation.label_model", runs)


def source_of(recipe: Recipe, runs: str | Path = "") -> Source:
    """Open the recipe's source; models that it names as `run:<recipe>` are looked up below `runs` when needed."""

    def find(name: str, setting: str) -> ModelRef:
        return find_model(recipe, name, setting, runs)

    return open_source(recipe.source, recipe.language, find, recipe.features.workers)


def find_model(recipe: Recipe, name: str, setting: str, runs: str | Path = "") -> ModelRef:
    """Return the model that a `setting` of the recipe names.

    `run:<recipe>` is the newest finished model of that recipe and this recipe's seed. Raises LabError if it is missing,
    or if the speech of this very recipe needs it.
    """
    if not name.startswith("run:"):
        return whisper_model.resolve(name)
    other, seed = name.removeprefix("run:"), recipe.training.seed
    if other == recipe.name and setting.startswith(_SOURCE):
        raise LabError(
            f"{setting} must name the model of another recipe, got {name!r}, which is this one: give each round its "
            "own name, such as name=round2"
        )
    folder = recipe_runs.newest_model_of_seed(environment.runs_folder(runs) / other, seed)
    if folder is None:
        start = "train it first"
        if other in names():
            start = command("run", recipe=load(other, {"training.seed": seed}), runs=runs)
        raise LabError(
            f"{setting} is {name!r}, and no finished run of {other} with training.seed={seed} is on this "
            f"machine: {start}"
        )
    return whisper_model.resolve(str(folder))


def source_identity(recipe: Recipe, folder: Path | None, runs: str | Path = "") -> dict[str, Any]:
    """Return the identity of the recipe's source; if it is not on this machine, the one recorded in the cache `folder`.

    Training needs the cache, not the gigabytes it was built from. The source's settings are compared in any case. A
    source whose path exists but cannot be read is an error, and so is an absent one without a cache.
    """
    try:
        return source_of(recipe, runs).identity()
    except LabError as error:
        if folder is None or (recipe.source.path and Path(recipe.source.path).expanduser().exists()):
            raise
        recorded = (manifest.read(folder) or {}).get("identity", {})
        logger.info(f"note: the source is not available ({error}); its identity is taken from the cache")
        return {name.removeprefix(_SOURCE): value for name, value in recorded.items() if name.startswith(_SOURCE)}


def _source_settings(recipe: Recipe, source: Mapping[str, Any]) -> dict[str, Any]:
    """Return the changed settings that select from a corpus; where the corpus is stored selects nothing.

    Nor do steps of an adaptation that the identity of the `source` does not name: the aligner is tuned, or they are 0.
    """
    changed = recipe.changed("source")
    if parts := changed.get("source.parts"):
        changed["source.parts"] = [_part_settings(part) for part in parts]
    unused = () if "adapt_steps" in source else ("adapt_steps",)
    ignored = {f"{_SOURCE}{name}" for name in (*_NAMES_OF_FILES, *unused, "kind")}
    return {f"settings.{name}": value for name, value in changed.items() if name not in ignored}


def _part_settings(part: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a part, newer ones only if changed: the digests of older mixes stay as they are."""
    defaults = PartSettings(name="plain").model_dump(mode="json")
    unchanged = [name for name in ("faults", "men", "own_names") if part[name] == defaults[name]]
    return {name: value for name, value in part.items() if name not in (*_NAMES_OF_FILES, *unchanged)}
