"""The stages as the notebooks and commands call them: each takes a recipe and a URI, and ends with the next URI.

    01  features(recipe)             -> FeatureCache     cache.uri
    02  train(recipe, cache)         -> TrainedModel     model.uri
        distil(recipe, cache)        -> the same of a student, after its teacher where there is none yet
        scores(recipe, cache, model.uri) -> the base model's and the tuned model's EvalReport
    03  transcriber(recipe, model_uri) -> Transcriber

What a stage made is noted in `runs/<recipe>/stages.json`, so that a later stage (and `make run`) finds it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import (
    audio,
    corpus,
    distillation,
    environment,
    evaluation,
    history,
    labels,
    ledger,
    manifest,
    models,
    ranks,
    relabel,
    stores,
    training,
)
from pipelines import cache as caches
from pipelines import recipe as recipes
from pipelines.cache import FeatureCache
from pipelines.curation import Gate
from pipelines.curation.selection import Selection
from pipelines.errors import LabError
from pipelines.evaluation import EvalReport
from pipelines.models import ModelRef
from pipelines.recipe import PartSettings, Recipe, digest
from pipelines.sources import SPLITS, Example, Source
from pipelines.sources.catalogue import open_source
from pipelines.training import Progress, TrainedModel, card, fleet
from pipelines.transcriber import Transcriber

if TYPE_CHECKING:
    import numpy as np
    from transformers import WhisperProcessor

MAX_DURATION_S = 30.0
"""Longer samples are not played: nothing longer is ever trained on."""
_REHEARSED = "thrown_away"
"""Folder of what a rehearsal makes; each one begins by removing it."""
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


def features(
    recipe: Recipe,
    *,
    runs: str | Path = "",
    cache_uri: str = "",
    publish: str = "",
    ray_address: str = "",
    log: Callable[[str], None] = print,
    on_clips: Callable[[int, int], None] = lambda n, of: None,
) -> FeatureCache:
    """Stage 01: the recipe's feature cache; made, finished if it was cut off, or opened if it is there.

    With `cache_uri` the cache lies in that folder: a finished one is opened if it is what the recipe asks for, and
    refused, naming the fields that differ, if it is not. One on the Hub or on Hopsworks is fetched. With `publish`
    the finished cache is copied to that URI. With `ray_address` the machines of a Ray cluster extract (cluster.py).
    `on_clips` is told of each block of clips that is done how many it held, and how many there are in all; 0 where the
    source cannot tell before it is read.
    """
    with _stage(recipe, runs, "features") as note:
        prepared, source = processor(recipe, log=log), open_source(recipe.source, recipe.language, log=log)
        identity = features_identity(recipe, source.identity(), prepared, runs)
        folder = _folder(cache_uri, log) if cache_uri else _cache_folder(runs, identity)
        if caches.is_finished(folder):
            cache = caches.open_cache(folder, identity, log=log)
            log(f"this cache is at hand, nothing is extracted again: {cache.uri}")
        else:
            reuse = _newest_first((environment.runs_folder(runs) / "features").glob("*/"))
            cache = _extract(recipe, source, prepared, folder, identity, reuse, log, runs, ray_address, on_clips)
        note |= {"cache_uri": cache.uri, "digest": cache.digest, "counts": cache.counts, "bytes": cache.bytes}
        note["curation"] = cache.curation
    if missing := [split for split in SPLITS if not len(cache.split(split))]:
        log(
            f"note: no {' and no '.join(missing)} clips: training selects by validation and ends with the test. "
            "Add a `split` column, or recordings of more speakers"
        )
    if publish:
        with _stage(recipe, runs, "publication") as note:
            note["cache_uri"] = _publish(cache, publish, log)
    return cache


def open_features(
    recipe: Recipe, cache_uri: str = "", *, runs: str | Path = "", log: Callable[[str], None] = print
) -> FeatureCache:
    """The cache that stage 02 trains on: `cache_uri`, else what stage 01 noted last. A stale one is refused.

    One that is not on this machine's own disk is fetched, and verified, into the lab's cache folder.
    """
    uri = cache_uri or stages(recipe, runs).get("features", {}).get("cache_uri")
    if not uri:
        raise LabError(
            f"no feature cache for recipe {recipe.name}: run 01_feature_pipeline first "
            f"(python -m pipelines features --recipe {recipe.name}), or give its URI as cache_uri"
        )
    with ranks.first_on_machine():
        folder = stores.at_hand(uri, log=log)
        identity = features_identity(recipe, _source_identity(recipe, folder, log), processor(recipe, log=log), runs)
        return caches.open_cache(folder, identity, log=log)


def train(
    recipe: Recipe,
    cache: FeatureCache,
    *,
    runs: str | Path = "",
    resume: str = "",
    publish: str = "",
    fork: str = "",
    cluster: str = "",
    devices: int = 1,
    progress: Progress | None = None,
) -> TrainedModel:
    """Stage 02: tune the recipe's base model on the cache; resumes by itself inside its own run folder.

    With the URI `resume` checkpoints are copied there in the background, and an empty machine goes on from there. With
    `publish` the finished model is copied to that URI. With `fork`, the URI of a run's folder, a checkpoint or a model,
    a new run starts from those weights. With the setting `training.fast_dev_run`, two steps are made anew each time, in
    a folder that no later stage looks into, and nothing is copied anywhere. With `cluster`, a Ray cluster's address,
    `devices` of its workers train together.

    A recipe that names a teacher trains its student, and raises LabError where that teacher is not trained yet.
    """
    if recipe.distillation.teacher and fork:
        raise LabError("a student starts from its teacher's layers: leave out --fork, or distillation.teacher")
    if devices > 1 and not cluster:
        raise LabError(
            f"devices={devices} needs a cluster; on one machine: python -m pipelines train --devices {devices}"
        )
    if cluster and ranks.size() > 1:
        raise LabError("torchrun and --cluster both start processes: leave one of them out")
    progress = (progress or Progress()) if ranks.is_first() else training.SILENT
    if recipe.training.fast_dev_run:
        recipe, cache = _rehearsal(recipe, cache, progress.on_line)
        resume = publish = ""
        ranks.by_first(lambda: shutil.rmtree(stage_folder(recipe, runs) / _REHEARSED, ignore_errors=True))
    with _stage(recipe, runs, "training") as note:
        with ranks.first_on_machine():
            base = starting_model(recipe, cache, runs, progress.on_line)
            parent = training.forks.find(fork, base, log=progress.on_line) if fork else None
        folder = run_folder(recipe, cache, base, runs, parent)
        if cluster:
            trained = fleet.train(cluster, devices, fleet.Job(recipe, cache, base, folder, resume, parent), progress)
        else:
            trained = training.train(recipe, cache, base, folder, progress, resume, fork=parent)
        note |= {
            "model_uri": trained.uri,
            "digest": trained.digest,
            "best_step": trained.best_step,
            "validation_wer": trained.validation["eval_wer"],
            "training_seconds": trained.seconds,
        }
    if publish and ranks.is_first():
        with _stage(recipe, runs, "model publication") as note:
            progress.on_line(f"the model is finished: {trained.uri}")
            published = stores.open_store(publish).publish(Path(trained.uri), publish, log=progress.on_line)
            progress.on_line(f"published as {published}")
            note["model_uri"] = published
    return trained


def distil(
    recipe: Recipe,
    cache: FeatureCache,
    *,
    runs: str | Path = "",
    progress: Progress | None = None,
    **how: Any,
) -> TrainedModel:
    """`train` for a recipe that names a teacher; one that a recipe is to make is trained first, where there is none.

    With the URI `resume` that teacher's checkpoints and its model are kept at the same URI with `-teacher` after it, so
    that an empty machine goes on with the very weights that the student began to learn from.
    """
    if not recipe.distillation.teacher:
        raise LabError(
            f"recipe {recipe.name} names no teacher: take --recipe tour-distil, or give one with --teacher (a model's "
            "URI, or run:<recipe>) and --set distillation.decoder_layers=2"
        )
    log = (progress or Progress()).on_line if ranks.is_first() else lambda line: None
    own = _recipe_of_teacher(recipe)
    made = own and _finished_teacher(own, cache, runs, log)
    kept = how.get("resume") and not recipe.training.fast_dev_run
    resume = f"{how['resume'].rstrip('/')}-teacher" if kept else ""
    if own is None or made:
        log("the teacher is at hand: none is trained")
    else:
        fetched = f", where {resume} has none" if resume else ""
        log(f"no finished run of {own.name} on this cache is here: the teacher is trained first{fetched}")
    if own and (resume or not made):  # one that is finished is only copied, where it is not there yet
        alike = {name: how[name] for name in ("cluster", "devices") if name in how}
        train(made[0] if made else own, cache, runs=runs, progress=progress, resume=resume, **alike)
    return train(recipe, cache, runs=runs, progress=progress, **how)


def starting_model(
    recipe: Recipe, cache: FeatureCache, runs: str | Path = "", log: Callable[[str], None] = lambda line: None
) -> ModelRef:
    """What training starts from: the recipe's base model, or its teacher. LabError where that is not to be had."""
    if not recipe.distillation.teacher:
        return models.resolve(recipe.model.base, log=log)
    own = _recipe_of_teacher(recipe)
    made = own and _finished_teacher(own, cache, runs, log)
    uri = made[1] if made else None if own else recipe.distillation.teacher
    if uri is None:
        raise LabError(
            f"distillation.teacher is {recipe.distillation.teacher!r}, and no finished run of it on this cache is on "
            f"this machine: python -m pipelines distill --recipe {recipe.name} trains it first"
        )
    teacher = models.resolve(uri, log=log)
    distillation.refuse_unfit(recipe, cache, teacher)
    prepared = models.load_processor(teacher, recipe.language)
    found = {
        "features.n_mels": prepared.feature_extractor.feature_size,
        "features.vocabulary": _vocabulary_sha256(prepared),
    }
    if unlike := recipes.differences({name: cache.identity.get(name) for name in found}, found):
        raise LabError(f"the teacher {teacher.title} cannot read this cache: {'; '.join(unlike)}. Take another teacher")
    return teacher


_FOR = "-for-"


def _recipe_of_teacher(recipe: Recipe) -> Recipe | None:
    """The recipe that makes the teacher, on the student's data; None where the teacher is a model's URI."""
    name, of_run = recipe.distillation.teacher, "run:"
    if not name.startswith(of_run):
        return None
    told = recipes.load(name.removeprefix(of_run))
    if told.distillation.teacher or told.name == recipe.name:
        raise LabError(
            f"distillation.teacher must name a recipe that tunes a whole model under another name, got {name!r}: "
            f"call the student something else (--set name={recipe.name}-distil), or name another teacher"
        )
    kept = {name: getattr(recipe, name) for name in ("language", "source", "features", "curation")}
    rehearsed = {"fast_dev_run": recipe.training.fast_dev_run}
    other = told.model.base != recipe.model.base or any(getattr(told, name) != value for name, value in kept.items())
    return told.model_copy(
        update={
            **kept,
            # on other data it is not that recipe's own model, and must not lie where that would be looked for
            "name": f"{told.name}{_FOR}{recipe.name}"[:64] if other else told.name,
            "model": told.model.model_copy(update={"base": recipe.model.base}),
            "training": told.training.model_copy(update=rehearsed),
        }
    )


def _finished_teacher(
    own: Recipe, cache: FeatureCache, runs: str | Path, log: Callable[[str], None]
) -> tuple[Recipe, str] | None:
    """The recipe that made the teacher of this cache, which may be called otherwise than `own`, and the model's URI; in
    a rehearsal one that was rehearsed will do."""
    plain = own.model_copy(update={"training": own.training.model_copy(update={"fast_dev_run": False})})
    base = models.resolve(own.model.base, log=log)
    asked = own.model_copy(update={"name": own.name.partition(_FOR)[0]})  # somebody may have trained it so by hand
    for wanted in (plain, own, asked):
        if made := training.finished(run_folder(wanted, cache, base, runs)):
            return wanted, made.uri
    return None


def evaluate(
    recipe: Recipe,
    cache: FeatureCache,
    model_uri: str,
    split: str = "test",
    *,
    runs: str | Path = "",
    log: Callable[[str], None] = print,
    on_clips: Callable[[int], None] = lambda n: None,
) -> EvalReport:
    """Score a model on a split of the cache; one that was scored before is read. A tuned model keeps its test score.

    Every scoring of the test split is counted (ledger.py), and the count told; a further one of the same model warns.
    `on_clips` is told of every batch how many clips it held.
    """
    if recipe.training.fast_dev_run:
        recipe, cache = _rehearsal(recipe, cache, log)
    ref = models.resolve(model_uri, log=log)
    made: list[int] = []
    with _bar(f"{split}: {ref.name}", len(cache.split(split))) as step:

        def decoded(n: int) -> None:
            step(n)
            on_clips(n)

        report = evaluation.evaluate(
            recipe, cache, ref, split, _reports(recipe, runs), on_start=made.append, on_clips=decoded
        )
    if split == "test" and not recipe.training.fast_dev_run:
        looks = ledger.note(environment.runs_folder(runs), report, ref, recipe.name, made=bool(made))
        log((made and looks.warning()) or str(looks))
    tuned = ref.facts.get("kind") == "model" and "made_of" not in ref.facts  # an export stays as it was made
    if split == "test" and tuned and ref.origin == "folder":
        _note_score(ref, report, recipe)
    history.add(report, environment.runs_folder(runs))
    return report


def _reports(recipe: Recipe, runs: str | Path) -> Path:
    rehearsed = _REHEARSED if recipe.training.fast_dev_run else ""
    return stage_folder(recipe, runs) / rehearsed / "reports"


def scores(
    recipe: Recipe, cache: FeatureCache, model_uri: str, *, runs: str | Path = "", log: Callable[[str], None] = print
) -> dict[str, EvalReport]:
    """Score the recipe's base model and the tuned one on the test split: `before` and `after`. Each is scored once."""
    with _stage(recipe, runs, "scores") as note:
        reports = {
            label: evaluate(recipe, cache, uri, "test", runs=runs, log=log)
            for label, uri in (("before", recipe.model.base), ("after", model_uri))
        }
        note |= {label: str(report.folder) for label, report in reports.items()}
    return reports


def transcriber(
    recipe: Recipe, model_uri: str = "", *, runs: str | Path = "", log: Callable[[str], None] = print
) -> Transcriber:
    """Stage 03: the model at `model_uri`, else what stage 02 noted last, ready to transcribe."""
    uri = model_uri or stages(recipe, runs).get("training", {}).get("model_uri")
    if not uri:
        raise LabError(
            f"no model for recipe {recipe.name}: run 02_training_pipeline first "
            f"(python -m pipelines train --recipe {recipe.name}), or give its URI as model_uri"
        )
    ref = models.resolve(uri, log=log)
    return Transcriber(ref, recipe.language, log=log)


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


def processor(recipe: Recipe, *, log: Callable[[str], None] = print) -> WhisperProcessor:
    """Tokenizer and feature extractor of the recipe's base model: what is needed beside a cache that is at hand."""
    return models.load_processor(models.resolve(recipe.model.base, log=log), recipe.language)


def label_model(recipe: Recipe, runs: str | Path = "", log: Callable[[str], None] = lambda line: None) -> ModelRef:
    """The model that is asked for label errors. LabError where a recipe's own is named, and there is none."""
    wanted, of_run = recipe.curation.label_model or recipe.model.base, "run:"
    if not wanted.startswith(of_run):
        return models.resolve(wanted, log=log)
    name, seed = wanted.removeprefix(of_run), recipe.training.seed
    found = training.newest_model(environment.runs_folder(runs) / name, seed)
    if found is None:
        raise LabError(
            f"curation.label_model is {wanted!r}, and no finished run of {name} with training.seed={seed} is on this "
            f"machine: python -m pipelines run --recipe {name} --set training.seed={seed}"
        )
    return models.resolve(str(found), log=log)


def stage_folder(recipe: Recipe, runs: str | Path = "") -> Path:
    """Where everything lies that runs of this recipe made."""
    return environment.runs_folder(runs) / training.rehearsal.folder_name(recipe)


def run_folder(
    recipe: Recipe,
    cache: FeatureCache,
    base: ModelRef,
    runs: str | Path = "",
    fork: training.Fork | None = None,
) -> Path:
    """The folder of one training run, named by all that decides its weights."""
    if recipe.training.fast_dev_run:
        return stage_folder(recipe, runs) / _REHEARSED / "run"
    return stage_folder(recipe, runs) / f"train-{digest(training.run_identity(recipe, cache, base, fork))}"


def stages(recipe: Recipe, runs: str | Path = "") -> dict[str, Any]:
    """What the stages noted: name to facts; empty where none ran. A rehearsal takes the features of the real thing."""
    try:
        noted = json.loads((stage_folder(recipe, runs) / "stages.json").read_text("utf-8"))
    except (OSError, ValueError):
        noted = {}
    if recipe.training.fast_dev_run and "features" not in noted:
        plain = recipe.model_copy(update={"training": recipe.training.model_copy(update={"fast_dev_run": False})})
        noted |= {name: facts for name, facts in stages(plain, runs).items() if name == "features"}
    return noted


def _rehearsal(recipe: Recipe, cache: FeatureCache, log: Callable[[str], None]) -> tuple[Recipe, FeatureCache]:
    log(training.rehearsal.NOTE)
    return training.rehearsal.shortened(recipe), training.rehearsal.few(cache, bool(recipe.distillation.teacher))


def _source_identity(recipe: Recipe, folder: Path, log: Callable[[str], None]) -> dict[str, Any]:
    """What the recipe's source tells of itself; where it is not at hand, what the cache in `folder` noted of it.

    Training wants the cache, not the gigabytes that it was made of: on another machine the note stands in for them,
    and the source's settings are compared all the same. A source that lies here but cannot be read is an error.
    """
    try:
        return open_source(recipe.source, recipe.language, log=log).identity()
    except LabError as error:
        if recipe.source.path and Path(recipe.source.path).expanduser().exists():
            raise
        noted = (manifest.read(folder) or {}).get("identity", {})
        log(f"note: the source is not at hand ({error}); what the cache noted of it is taken")
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
    log: Callable[[str], None],
    runs: str | Path,
    ray_address: str,
    on_clips: Callable[[int, int], None],
) -> FeatureCache:
    settings, curation = recipe.features, recipe.curation
    gate = Gate(
        labels.labeller(processor, recipe.language),
        identity["features.n_mels"],
        settings.min_duration_s,
        settings.max_duration_s,
        settings.min_peak,
        corpus.limits(curation),
        curation.full_stop,
    )
    held_out = corpus.load_held_out(curation.held_out, gate.n_mels, log)
    before = corpus.survey(curation, source, held_out)
    n_left = before.counts[0].before - len(before.dropped) if before else 0

    def finish(cache: FeatureCache, rejected: list[dict[str, str]]) -> Selection:
        return corpus.finish(
            curation, cache, rejected, before, held_out, lambda rows: _hear(recipe, cache, rows, runs, log), gate.label
        )

    with _bar("log-mel", n_left or None) as step:

        def done(n: int) -> None:
            step(n)
            on_clips(n, n_left)

        return caches.build(
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
            log=log,
        )


def _hear(
    recipe: Recipe, cache: FeatureCache, rows: np.ndarray, runs: str | Path, log: Callable[[str], None]
) -> list[str]:
    """What the label model hears in these rows of the cache."""
    ref, folder = label_model(recipe, runs, log), environment.runs_folder(runs) / "label_errors"
    log(f"asking {ref.title} what it hears in {len(rows)} training clips")
    with _bar("label errors", len(rows)) as step:
        return relabel.heard(cache, rows, ref, recipe.language, recipe.evaluation, folder, on_clips=step)


def _newest_first(folders: Iterable[Path]) -> list[Path]:
    return sorted(folders, key=lambda folder: -folder.stat().st_mtime)


def _cache_folder(runs: str | Path, identity: dict[str, Any]) -> Path:
    """Caches are shared between recipes, and between sources that are one corpus, as an archive and its download are.

    Library versions stay out of the name, so that an upgrade keeps the cache.
    """
    lasting = {name: value for name, value in identity.items() if not name.startswith("library.")}
    return environment.runs_folder(runs) / "features" / f"{identity[f'{_SOURCE}kind']}-{digest(lasting)}"


def _folder(cache_uri: str, log: Callable[[str], None]) -> Path:
    """Where a cache lies, or is to lie: a path as it is, also on a drive; anything else is fetched."""
    return (
        stores.at_hand(cache_uri, log=log) if stores.is_remote(cache_uri) else Path(cache_uri).expanduser().absolute()
    )


def _publish(cache: FeatureCache, uri: str, log: Callable[[str], None]) -> str:
    """Copy a cache to `uri`; where LAB_FEATURE_GROUP names one, its rows go to that group of the Hopsworks project."""
    published = stores.open_store(uri).publish(cache.folder, uri, log=log)
    log(f"published as {published}")
    if (group := os.environ.get("LAB_FEATURE_GROUP")) and uri.startswith("hopsworks://"):
        stores.hopsworks.add_rows(published, cache.rows, group, log=log)
    return published


def _note_score(ref: ModelRef, report: EvalReport, recipe: Recipe) -> None:
    """Tell the score in the model's manifest and card, at the time of the sealing: the app serves the newest model."""
    note = ref.folder / manifest.MANIFEST
    sealed_ns = note.stat().st_mtime_ns
    of = card.data_of(recipe.source.model_dump(mode="json"))
    scored = {"test_set": report.test_set, "normaliser": report.normaliser, "n": report.score.n}
    told = {"test": report.score.as_dict(), "test_raw": report.raw.as_dict(), "test_data": of, "test_scored": scored}
    card.refresh(ref.folder, **told)
    os.utime(note, ns=(sealed_ns, sealed_ns))


def _vocabulary_sha256(processor: Any) -> str:
    vocabulary = sorted(processor.tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _stage(recipe: Recipe, runs: str | Path, name: str) -> Iterator[dict[str, Any]]:
    """Note what the stage made and how long it took, once it has ended well."""
    started, facts = time.monotonic(), {}
    yield facts
    if not ranks.is_first():
        return
    folder = stage_folder(recipe, runs)
    folder.mkdir(parents=True, exist_ok=True)
    facts["seconds"] = round(time.monotonic() - started, 2)
    manifest.write_json(folder / "stages.json", {**stages(recipe, runs), name: facts})


@contextlib.contextmanager
def _bar(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A progress bar in clips; yields the function that moves it on."""
    from tqdm.auto import tqdm

    with tqdm(desc=label, total=total, unit="clip") as bar:
        yield bar.update
