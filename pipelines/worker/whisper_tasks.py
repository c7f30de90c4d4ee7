"""The lab's pipelines as tasks of the worker: features, train, evaluate, transcribe, publish.

<folder>/
    features/    <recipe>/reports/    as in any folder of runs
    tuned/<run>/                      the last training: its checkpoints, then its model
    saved/                            models of `save`, unless the operator named another store
"""

from __future__ import annotations

import json
import logging
import secrets
import shutil
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from pipelines import recipes
from pipelines.experiments import pipeline as experiment_pipeline
from pipelines.features import pipeline as feature_pipeline
from pipelines.features.cache import FeatureCache
from pipelines.features.sources import SPLITS
from pipelines.infra import console
from pipelines.infra import stores as infra_stores
from pipelines.infra.errors import LabError
from pipelines.recipes import languages as whisper_languages
from pipelines.recipes.settings import Recipe
from pipelines.speech.audio import AudioError
from pipelines.training import loop as training_loop
from pipelines.training import pipeline as training_pipeline
from pipelines.training import run as training_run
from pipelines.training.callbacks import progress
from pipelines.whisper import model as whisper_model
from pipelines.worker import whisper_parameters
from pipelines.worker.interface import FineTuningInterface, Ignored, Parameter
from pipelines.worker.whisper_parameters import Parameters, choose, require_one_of, settings_of

MAX_DURATION_S = 600.0
"""Longest recording in seconds that `test` transcribes."""
NAME = "{name}"
"""Placeholder in a store's URI for the name of the saved model."""
_MEASURED = ("progress_percent", "epoch", "learning_rate", "loss", "wer")
_OF_TRAINING = (*_MEASURED, "model_uri", "model", "saved")
_OF_DATA = ("dataset", "language", "cache_uri", "cache_digest", "clips", "scores")

logger = logging.getLogger(__name__)


class WhisperFineTuning(FineTuningInterface):
    """Whisper, tuned by `recipe`. Clients can use only the data sets, languages and stores that the operator allows.

    `datasets` are recipes by the name that clients use; their `[source]`, `[curation]` and language are used. The first
    is that of `recipe`. `languages` are allowed beside a data set's language. `stores` are URIs by name, the first is
    the default, and `{name}` in them is replaced by the model's name. Raises LabError for settings that do not work.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        *,
        datasets: Mapping[str, Recipe] | None = None,
        languages: tuple[str, ...] = (),
        stores: Mapping[str, str] | None = None,
        max_duration_s: float = MAX_DURATION_S,
    ):
        # absolute: a job's process may run in another folder, and URIs of caches and models are compared
        self.recipe, self.folder, self.max_duration_s = recipe, Path(folder).absolute(), max_duration_s
        self.datasets = {recipe.name: recipe, **(datasets or {})}
        self.languages = {
            name: tuple(dict.fromkeys((data.language, *map(whisper_languages.parse, languages))))
            for name, data in self.datasets.items()
        }
        self.stores = dict(stores or {}) or {"saved": str(self.folder / "saved" / NAME)}
        for name in self.datasets:
            for language in self.languages[name]:
                _refuse_leaks(self._recipe(name, language))
                _refuse_runs(self._recipe(name, language))
        for uri in self.stores.values():
            _check_store(uri)

    def check(self, task: str, params: dict[str, Any], logs_dict: MutableMapping[str, Any]) -> dict[str, Any]:
        request = whisper_parameters.validate(params)
        prepared = {} if task == "dataset" else logs_dict
        # the prepared data set may no longer be allowed; a tuned model can still be tried and saved
        request.dataset = choose("dataset", request.dataset, prepared.get("dataset"), self.datasets)
        allowed = self.languages[request.dataset]
        requested = whisper_languages.parse_optional(request.language)
        request.language = choose("language", requested, prepared.get("language"), allowed)
        request.store = require_one_of("store", request.store or next(iter(self.stores)), self.stores)
        if task in ("train", "eval"):
            _refuse_other_data(request, logs_dict)
        if task == "save" and not logs_dict.get("model_uri"):
            raise Ignored("nothing was tuned yet; send the task train first")
        values = request.model_dump()
        values["audio"] = whisper_parameters.decode_audio(request.audio) if task == "test" else b""
        _remove_values_of(task, logs_dict)
        run = {"run": secrets.token_hex(4)} if task == "train" else {}
        return {name: values[name] for name in whisper_parameters.TASK_PARAMETERS[task]} | run

    def forget(self, task: str, logs_dict: MutableMapping[str, Any]) -> None:
        _remove_values_of(task, logs_dict)

    def parameters(self) -> dict[str, list[Parameter]]:
        choices = {
            "dataset": tuple(self.datasets),
            "language": tuple(dict.fromkeys(code for codes in self.languages.values() for code in codes)),
            "split": ("test", "validation"),
            "store": tuple(self.stores),
        }
        return {
            task: [whisper_parameters.form_field(name, choices.get(name, ())) for name in names]
            for task, names in whisper_parameters.FORM_FIELDS.items()
        }

    def dataset(self, params: dict[str, Any], logs_dict: MutableMapping[str, Any]) -> None:
        cache = feature_pipeline.run(self._recipe(**params), runs=self.folder, on_clips=_progress_counter(logs_dict))
        if logs_dict.get("cache_digest") != cache.digest:
            if logs_dict.get("model_uri"):
                logger.info(
                    "the tuned model is no longer used: it may have been trained on held-out clips of this data set"
                )
            _remove(logs_dict, *_OF_TRAINING, *_OF_DATA)
        clips = {split: len(cache.split(split)) for split in SPLITS}
        logs_dict.update(params, cache_uri=cache.uri, cache_digest=cache.digest, clips=clips, progress_percent=100.0)

    def train(self, params: dict[str, Any], logs_dict: MutableMapping[str, Any]) -> None:
        folder = self.folder / "tuned" / params["run"]
        self._remove_other_models(folder)
        plain = self._recipe(params["dataset"], params["language"])
        cache = self._cache(plain, logs_dict)
        per_epoch = training_loop.steps_per_epoch(plain, cache)
        recipe = recipes.resolve(plain.model_dump(mode="json"), settings_of(params, per_epoch))
        logger.info(f"{recipe.training.steps} steps, {per_epoch} to an epoch")
        self._remove_other_runs(folder, recipe, cache)
        model = training_pipeline.run(recipe, cache, runs=folder, progress=_progress(logs_dict, per_epoch))
        name = f"{recipe.name}-{model.digest}"
        logs_dict.update(model_uri=model.uri, model=name, progress_percent=100.0, wer=model.validation["eval_wer"])

    def eval(self, params: dict[str, Any], logs_dict: MutableMapping[str, Any]) -> None:
        recipe = self._recipe(params["dataset"], params["language"])
        uri = logs_dict.get("model_uri")
        cache = self._cache(recipe, logs_dict)
        model, split = uri or recipe.model.base, params["split"]
        on_clips = _progress_counter(logs_dict, len(cache.split(split)))
        report = experiment_pipeline.evaluate(recipe, cache, model, split, runs=self.folder, on_clips=on_clips)
        score = report.score
        ci95 = score.ci95 and list(score.ci95)
        entry = {"wer": score.wer, "ci95": ci95, "over": score.over, "clips": score.n, "split": split}
        scores = {**logs_dict.get("scores", {}), "tuned" if uri else "base": entry}
        logs_dict.update(wer=score.wer, scores=scores, progress_percent=100.0)
        logger.info(f"the {'tuned' if uri else 'base'} model on {split}: {score}")

    def test(self, params: dict[str, Any], logs_dict: MutableMapping[str, Any]) -> dict[str, Any]:
        from pipelines.inference.api.schemas import audio_refusal
        from pipelines.inference.transcriber import Transcriber
        from pipelines.inference.transcript import DamagedRecording

        ref = whisper_model.resolve(logs_dict.get("model_uri") or self.recipe.model.base)
        transcriber = Transcriber(ref, params["language"], "transformers")
        try:
            transcript = transcriber.transcribe(params["audio"], self.max_duration_s)
        except DamagedRecording as error:
            transcript = error.transcript
        except AudioError as error:
            raise LabError(audio_refusal(error).detail) from None
        return {
            **({"damage": transcript.damage} if transcript.damage else {}),
            "text": transcript.text,
            "confidence": round(transcript.confidence, 4),
            "duration_s": round(transcript.audio_s, 3),
            "model": "tuned" if logs_dict.get("model_uri") else "base",
        }

    def save(self, params: dict[str, Any], logs_dict: MutableMapping[str, Any]) -> dict[str, Any]:
        folder, name = Path(logs_dict["model_uri"]), params["name"] or logs_dict["model"]
        uri = self.stores[params["store"]].replace(NAME, name)
        with console.rewritten(lambda line: line.replace(uri, "the store")):
            published = infra_stores.open_store(uri).publish(folder, uri)
        location = {"uri": published} if infra_stores.is_remote(uri) else {"name": Path(uri).name}
        logs_dict["saved"] = {"store": params["store"], "model": logs_dict["model"]} | location
        return logs_dict["saved"]

    def status(self, params: dict[str, Any], logs_dict: Mapping[str, Any]) -> dict[str, Any]:
        measured = {name: logs_dict.get(name) for name in _MEASURED}
        dataset = f"{logs_dict['dataset']}:{logs_dict['language']}" if "dataset" in logs_dict else None
        return {
            **measured,
            "dataset": dataset,
            "clips": logs_dict.get("clips"),
            "model": logs_dict.get("model") or "base",
            "scores": logs_dict.get("scores", {}),
            "saved": logs_dict.get("saved"),
        }

    def private_paths(self) -> tuple[str, ...]:
        stores = [uri.partition(NAME)[0] for uri in self.stores.values() if not infra_stores.is_remote(uri)]
        sources = [path for data in self.datasets.values() for path in (data.source.path, data.source.sentences)]
        paths = [Path(path).expanduser() for path in stores + sources if path]
        return tuple(str(path) for path in paths if path.is_absolute())

    def _recipe(self, dataset: str, language: str) -> Recipe:
        """Return the recipe for a data set, without time budget and fast_dev_run."""
        data = self.datasets[require_one_of("dataset", dataset, self.datasets)].model_dump(mode="json")
        settings = self.recipe.model_dump(mode="json") | {name: data[name] for name in ("source", "curation")}
        overrides = {"language": language, "training.max_hours": 0.0, "training.fast_dev_run": False}
        return recipes.resolve(settings, overrides)

    def _remove_other_runs(self, folder: Path, recipe: Recipe, cache: FeatureCache) -> None:
        """Remove and log runs of this training that were started under other settings of the worker."""
        base = whisper_model.resolve(recipe.model.base)
        identity = training_run.run_identity(recipe, cache, base)
        run = training_pipeline.run_folder(recipe, cache, base, folder)
        for path in folder.glob("*/train-*/run.json"):
            if path.parent != run:
                changed = recipes.differences(identity, json.loads(path.read_text("utf-8")))
                logger.info(f"this training starts again: the worker's settings have changed ({'; '.join(changed)})")
                shutil.rmtree(path.parent)

    def _cache(self, recipe: Recipe, logs_dict: Mapping[str, Any]) -> FeatureCache:
        return feature_pipeline.open_cache(recipe, logs_dict["cache_uri"], runs=self.folder)

    def _remove_other_models(self, folder: Path) -> None:
        """Remove the models of earlier trainings; only the one in `folder` is kept."""
        for other in (self.folder / "tuned").glob("*"):
            if other != folder:
                logger.info("the model of the previous training is removed; saved models stay")
                shutil.rmtree(other)


def _progress(logs_dict: MutableMapping[str, Any], per_epoch: int) -> progress.Progress:
    """Return a Progress that writes percent, epoch and the newest measurements to `logs_dict`."""
    steps = 1

    def done(step: int) -> None:
        logs_dict.update(progress_percent=round(100 * step / steps, 1), epoch=round(step / per_epoch, 3))

    def start(step: int, of: int) -> None:
        nonlocal steps
        steps = of
        done(step)

    def log(history: list[dict[str, float]]) -> None:
        newest = {name: row[name] for row in history for name in ("loss", "learning_rate", "eval_wer") if name in row}
        logs_dict.update({name.removeprefix("eval_"): float(f"{value:.6g}") for name, value in newest.items()})

    return progress.Progress(on_start=start, on_step=done, on_log=log)


def _progress_counter(logs_dict: MutableMapping[str, Any], clips: int = 0) -> Callable[..., None]:
    """Return a function that adds clips and writes their percentage of `clips` to `logs_dict`.

    The function also takes the total number; with an unknown total (0) it writes nothing.
    """
    done = 0

    def count(n: int, total: int = clips) -> None:
        nonlocal done
        done += n
        if total:
            logs_dict["progress_percent"] = round(min(100.0, 100 * done / total), 1)

    count(0)
    return count


def _remove_values_of(task: str, logs_dict: MutableMapping[str, Any]) -> None:
    """Remove the values of a task that starts or was cancelled."""
    if task == "train":
        _remove(logs_dict, *_OF_TRAINING)
        logs_dict["scores"] = {name: score for name, score in logs_dict.get("scores", {}).items() if name == "base"}
    if task in ("dataset", "eval"):
        _remove(logs_dict, "progress_percent")


def _remove(logs_dict: MutableMapping[str, Any], *names: str) -> None:
    for name in names:
        logs_dict.pop(name, None)


def _refuse_other_data(request: Parameters, logs_dict: Mapping[str, Any]) -> None:
    prepared = logs_dict["dataset"], logs_dict["language"]
    if (request.dataset, request.language) != prepared:
        raise Ignored(f"the data set that is prepared is {':'.join(prepared)}; send the task dataset to change it")


def _refuse_leaks(recipe: Recipe) -> None:
    if recipe.curation.leaks == "ignore":
        raise LabError(
            f"the worker trains on no held-out speaker, and a data set of recipe {recipe.name} has curation.leaks = "
            "'ignore': set it to drop or refuse"
        )


def _refuse_runs(recipe: Recipe) -> None:
    """Raise LabError if the recipe needs runs of other recipes, which a worker has no access to."""
    if recipe.distillation.teacher or recipe.curation.label_model.startswith("run:"):
        name = "distillation.teacher" if recipe.distillation.teacher else "curation.label_model = 'run:…'"
        raise LabError(
            f"the worker has no access to other runs, and recipe {recipe.name} has {name}: take another recipe, "
            "or call distill and train on the command line"
        )


def _check_store(uri: str) -> None:
    """Raise LabError if a store's URI cannot be used."""
    infra_stores.open_store(uri)
    if uri.count(NAME) != uri.count("{"):
        raise LabError(f"a store's URI may hold {NAME} for the model's name and no other braces, got {uri}")
