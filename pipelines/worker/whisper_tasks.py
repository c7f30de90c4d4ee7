"""The lab's own pipelines behind the interface: features, train, evaluate, transcribe, publish.

<folder>/
    features/    <recipe>/reports/    as in any folder of runs
    tuned/<run>/                      what the last training made: its checkpoints, then its model
    saved/                            where `save` puts models unless the operator named another store
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import math
import re
import secrets
import shutil
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipelines import recipes
from pipelines.experiments import pipeline as experiment_pipeline
from pipelines.features import pipeline as feature_pipeline
from pipelines.features.cache import FeatureCache
from pipelines.features.sources import SPLITS
from pipelines.infra import console
from pipelines.infra import stores as infra_stores
from pipelines.infra.errors import LabError
from pipelines.recipes.settings import Recipe
from pipelines.speech.audio import AudioError
from pipelines.training import loop as training_loop
from pipelines.training import pipeline as training_pipeline
from pipelines.training import run as training_run
from pipelines.training.callbacks import progress
from pipelines.whisper import model as whisper_model
from pipelines.worker.interface import FineTuningInterface, Ignored, Parameter

MAX_DURATION_S = 600.0
"""Longer recordings are not transcribed by `test`."""
NAME = "{name}"
"""In a store's URI: the name that a model is saved under."""
_TASKS = {
    "dataset": ("dataset", "language"),
    "train": ("epochs", "learning_rate", "warmup_ratio"),
    "eval": ("split",),
    "test": ("audio",),
    "save": ("store", "name"),
}
"""What the page offers for each task. One set of parameters may be sent to all of them."""
_MEASURED = ("progress_percent", "epoch", "learning_rate", "loss", "wer")
_OF_TRAINING = (*_MEASURED, "model_uri", "model", "saved")
_OF_DATA = ("dataset", "language", "cache_uri", "cache_digest", "clips", "scores")

logger = logging.getLogger(__name__)


class Parameters(BaseModel):
    """What a client may send."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    epochs: float = Field(1.0, gt=0, le=1_000, description="how often every training clip is seen")
    learning_rate: float = Field(1e-5, gt=0, le=1, description="the highest, after the warm-up")
    warmup_ratio: float = Field(0.25, ge=0, le=1, description="share of the steps over which the rate rises")
    dataset: str = Field("", max_length=64, description="what to tune and score on")
    language: str = Field("", max_length=3, description="Whisper's code of the language")
    split: Literal["test", "validation"] = Field("test", description="what is scored")
    store: str = Field("", max_length=64, description="where the model is saved")
    name: str = Field(
        "",
        pattern=r"^([a-z0-9][a-z0-9_-]*(\.[a-z0-9_-]+)*)?$",
        max_length=64,
        description="its name there; empty: the model's own",
    )
    audio: str | bytes = Field("", description="the recording: a file, in JSON its bytes as base64")


class WhisperFineTuning(FineTuningInterface):
    """Whisper, tuned by `recipe`; what clients may name is what the operator allowed.

    `datasets` are recipes by the name that clients use, of which `[source]`, `[curation]` and the language are taken;
    the recipe's own is the first. `languages` may be asked for besides a data set's own. `stores` are URIs by name,
    the first being the one where none is named; `{name}` in them stands for the model's name. Raises LabError for what
    cannot be offered.
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
        self.recipe, self.folder, self.max_duration_s = recipe, folder, max_duration_s
        self.datasets = {recipe.name: recipe, **(datasets or {})}
        self.languages = {
            name: tuple(dict.fromkeys((data.language, *languages))) for name, data in self.datasets.items()
        }
        self.stores = dict(stores or {}) or {"saved": str(folder / "saved" / NAME)}
        for name in self.datasets:
            for language in self.languages[name]:
                _refuse_leaks(self._recipe(name, language))
                _refuse_runs(self._recipe(name, language))
        for uri in self.stores.values():
            _refuse_place(uri)

    # --- what is asked before a task begins

    def check(self, task: str, params: dict[str, Any], logs_dict: MutableMapping[str, Any]) -> dict[str, Any]:
        asked = _asked(params)
        prepared = {} if task == "dataset" else logs_dict
        # what is prepared may be offered no more: a model that is tuned can be tried and saved all the same
        asked.dataset = _settled("dataset", asked.dataset, prepared.get("dataset"), self.datasets)
        allowed = self.languages[asked.dataset]
        asked.language = _settled("language", asked.language, prepared.get("language"), allowed)
        asked.store = _one_of("store", asked.store or next(iter(self.stores)), self.stores)
        if task in ("train", "eval"):
            _refuse_other_data(asked, logs_dict)
        if task == "save" and not logs_dict.get("model_uri"):
            raise Ignored("nothing was tuned yet; send the task train first")
        told = asked.model_dump()
        told["audio"] = _audio(asked.audio) if task == "test" else b""
        _make_room(task, logs_dict)
        return {name: told[name] for name in _NEEDED[task]} | ({"run": secrets.token_hex(4)} if task == "train" else {})

    def forget(self, task: str, logs_dict: MutableMapping[str, Any]) -> None:
        _make_room(task, logs_dict)

    def parameters(self) -> dict[str, list[Parameter]]:
        choices = {
            "dataset": tuple(self.datasets),
            "language": tuple(dict.fromkeys(code for codes in self.languages.values() for code in codes)),
            "split": ("test", "validation"),
            "store": tuple(self.stores),
        }
        return {task: [_offered(name, choices.get(name, ())) for name in names] for task, names in _TASKS.items()}

    # --- the tasks

    def dataset(self, params: dict[str, Any], logs_dict: MutableMapping[str, Any]) -> None:
        cache = feature_pipeline.run(self._recipe(**params), runs=self.folder, on_clips=_counted(logs_dict))
        if logs_dict.get("cache_digest") != cache.digest:
            if logs_dict.get("model_uri"):
                logger.info("the tuned model is set aside: it may have been trained on what is held out here")
            _forget(logs_dict, *_OF_TRAINING, *_OF_DATA)
        clips = {split: len(cache.split(split)) for split in SPLITS}
        logs_dict.update(params, cache_uri=cache.uri, cache_digest=cache.digest, clips=clips, progress_percent=100.0)

    def train(self, params: dict[str, Any], logs_dict: MutableMapping[str, Any]) -> None:
        home = self.folder / "tuned" / params["run"]
        self._remove_all_but(home)
        plain = self._recipe(params["dataset"], params["language"])
        cache = self._cache(plain, logs_dict)
        per_epoch = training_loop.steps_per_epoch(plain, cache)
        recipe = recipes.resolve(plain.model_dump(mode="json"), settings_of(params, per_epoch))
        logger.info(f"{recipe.training.steps} steps, {per_epoch} to an epoch")
        self._remove_other_runs(home, recipe, cache)
        model = training_pipeline.run(recipe, cache, runs=home, progress=_progress(logs_dict, per_epoch))
        told = {"model_uri": model.uri, "model": f"{recipe.name}-{model.digest}"}
        logs_dict.update(told, progress_percent=100.0, wer=model.validation["eval_wer"])

    def eval(self, params: dict[str, Any], logs_dict: MutableMapping[str, Any]) -> None:
        recipe = self._recipe(params["dataset"], params["language"])
        uri = logs_dict.get("model_uri")
        cache = self._cache(recipe, logs_dict)
        model, split = uri or recipe.model.base, params["split"]
        tell = _counted(logs_dict, len(cache.split(split)))
        report = experiment_pipeline.evaluate(recipe, cache, model, split, runs=self.folder, on_clips=tell)
        score = report.score
        told = {"wer": score.wer, "ci95": list(score.ci95), "clips": score.n, "split": split}
        scores = {**logs_dict.get("scores", {}), "tuned" if uri else "base": told}
        logs_dict.update(wer=score.wer, scores=scores, progress_percent=100.0)
        logger.info(f"the {'tuned' if uri else 'base'} model on {split}: {score}")

    def test(self, params: dict[str, Any], logs_dict: MutableMapping[str, Any]) -> dict[str, Any]:
        from pipelines.inference.api.schemas import audio_refusal
        from pipelines.inference.transcriber import Transcriber

        ref = whisper_model.resolve(logs_dict.get("model_uri") or self.recipe.model.base)
        transcriber = Transcriber(ref, params["language"], "transformers")
        try:
            heard = transcriber.transcribe(params["audio"], self.max_duration_s)
        except AudioError as error:
            raise LabError(audio_refusal(error).detail) from None
        return {
            "text": heard.text,
            "confidence": round(heard.confidence, 4),
            "duration_s": round(heard.audio_s, 3),
            "model": "tuned" if logs_dict.get("model_uri") else "base",
        }

    def save(self, params: dict[str, Any], logs_dict: MutableMapping[str, Any]) -> dict[str, Any]:
        folder, name = Path(logs_dict["model_uri"]), params["name"] or logs_dict["model"]
        uri = self.stores[params["store"]].replace(NAME, name)
        with console.rewritten(lambda line: line.replace(uri, "the store")):
            published = infra_stores.open_store(uri).publish(folder, uri)
        told = {"store": params["store"], "model": logs_dict["model"]}
        told |= {"uri": published} if infra_stores.is_remote(uri) else {"name": Path(uri).name}
        logs_dict["saved"] = told
        return told

    def status(self, params: dict[str, Any], logs_dict: Mapping[str, Any]) -> dict[str, Any]:
        known = {name: logs_dict.get(name) for name in _MEASURED}
        dataset = f"{logs_dict['dataset']}:{logs_dict['language']}" if "dataset" in logs_dict else None
        return {
            **known,
            "dataset": dataset,
            "clips": logs_dict.get("clips"),
            "model": logs_dict.get("model") or "base",
            "scores": logs_dict.get("scores", {}),
            "saved": logs_dict.get("saved"),
        }

    def places(self) -> tuple[str, ...]:
        kept = [uri.partition(NAME)[0] for uri in self.stores.values() if not infra_stores.is_remote(uri)]
        read = [place for data in self.datasets.values() for place in (data.source.path, data.source.sentences)]
        known = [Path(place).expanduser() for place in kept + read if place]
        return tuple(str(place) for place in known if place.is_absolute())

    # ---

    def _recipe(self, dataset: str, language: str) -> Recipe:
        """The recipe on a data set; its time budget and rehearsal are the command line's, not a service's."""
        data = self.datasets[_one_of("dataset", dataset, self.datasets)].model_dump(mode="json")
        settings = self.recipe.model_dump(mode="json") | {name: data[name] for name in ("source", "curation")}
        own = {"language": language, "training.max_hours": 0.0, "training.fast_dev_run": False}
        return recipes.resolve(settings, own)

    def _remove_other_runs(self, home: Path, recipe: Recipe, cache: FeatureCache) -> None:
        """Where this training began under other settings of the worker, it begins anew, and not in silence."""
        base = whisper_model.resolve(recipe.model.base)
        wanted, run = (
            training_run.run_identity(recipe, cache, base),
            training_pipeline.run_folder(recipe, cache, base, home),
        )
        for note in home.glob("*/train-*/run.json"):
            if note.parent != run:
                unlike = recipes.differences(wanted, json.loads(note.read_text("utf-8")))
                logger.info(f"this training begins anew: the worker's settings are others now ({'; '.join(unlike)})")
                shutil.rmtree(note.parent)

    def _cache(self, recipe: Recipe, logs_dict: Mapping[str, Any]) -> FeatureCache:
        return feature_pipeline.open_cache(recipe, logs_dict["cache_uri"], runs=self.folder)

    def _remove_all_but(self, home: Path) -> None:
        """Only one model is kept: a training begins from a fresh one, and goes on in `home` where it was cut off."""
        for other in (self.folder / "tuned").glob("*"):
            if other != home:
                logger.info("the model of the training before is let go; what was saved stays")
                shutil.rmtree(other)


_NEEDED = {
    "dataset": ("dataset", "language"),
    "train": ("dataset", "language", "epochs", "learning_rate", "warmup_ratio"),
    "eval": ("dataset", "language", "split"),
    "test": ("language", "audio"),
    "save": ("store", "name"),
}
"""The parameters that a task runs with."""


def settings_of(params: Mapping[str, Any], steps_per_epoch: int) -> dict[str, Any]:
    """The recipe's settings for epochs, learning_rate and warmup_ratio; steps are rounded up, as transformers does."""
    steps = max(1, math.ceil(params["epochs"] * steps_per_epoch))
    return {
        "training.steps": steps,
        "training.learning_rate": params["learning_rate"],
        "training.warmup_steps": math.ceil(params["warmup_ratio"] * steps),
    }


def _progress(logs_dict: MutableMapping[str, Any], per_epoch: int) -> progress.Progress:
    """Training tells `logs_dict` how far it is, and the last that it measured."""
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


def _counted(logs_dict: MutableMapping[str, Any], clips: int = 0) -> Callable[..., None]:
    """A function that is told of clips that are done, and tells `logs_dict` their share of `clips`, or of the number
    that comes with them; of an unknown number (0) nothing."""
    done = 0

    def tell(n: int, of: int = clips) -> None:
        nonlocal done
        done += n
        if of:
            logs_dict["progress_percent"] = round(min(100.0, 100 * done / of), 1)

    tell(0)
    return tell


def _make_room(task: str, logs_dict: MutableMapping[str, Any]) -> None:
    """Forget what a task that begins will tell anew, and what one that was cancelled has told."""
    if task == "train":
        _forget(logs_dict, *_OF_TRAINING)
        logs_dict["scores"] = {name: score for name, score in logs_dict.get("scores", {}).items() if name == "base"}
    if task in ("dataset", "eval"):
        _forget(logs_dict, "progress_percent")


def _forget(logs_dict: MutableMapping[str, Any], *names: str) -> None:
    for name in names:
        logs_dict.pop(name, None)


def _asked(params: Mapping[str, Any]) -> Parameters:
    try:
        return Parameters.model_validate(params)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])[:40]
        if first["type"] == "extra_forbidden":
            raise LabError(f"there is no parameter {name!r}; there are {', '.join(Parameters.model_fields)}") from None
        wanted = "small letters a to z, digits, -, _ and single dots" if name == "name" else first["msg"]
        raise LabError(f"{name}: {wanted}") from None


def _one_of(what: str, name: str, allowed: Mapping[str, Any] | tuple[str, ...]) -> str:
    if name not in allowed:
        raise LabError(f"{what} must be one of {', '.join(allowed)}: others are not offered by this worker")
    return name


def _settled(what: str, asked: str, prepared: str | None, allowed: Mapping[str, Any] | tuple[str, ...]) -> str:
    """What was asked for, else what is prepared, else the first that is offered."""
    return _one_of(what, asked or (prepared if prepared in allowed else "") or next(iter(allowed)), allowed)


def _refuse_other_data(asked: Parameters, logs_dict: Mapping[str, Any]) -> None:
    prepared = logs_dict["dataset"], logs_dict["language"]
    if (asked.dataset, asked.language) != prepared:
        raise Ignored(f"the data set that is prepared is {':'.join(prepared)}; send the task dataset to change it")


def _refuse_leaks(recipe: Recipe) -> None:
    if recipe.curation.leaks == "ignore":
        raise LabError(
            f"the worker trains on no held-out speaker, and a data set of recipe {recipe.name} has curation.leaks = "
            "'ignore': set it to drop or refuse"
        )


def _refuse_runs(recipe: Recipe) -> None:
    """A worker keeps runs of its own, and looks into nobody else's."""
    if recipe.distillation.teacher or recipe.curation.label_model.startswith("run:"):
        name = "distillation.teacher" if recipe.distillation.teacher else "curation.label_model = 'run:…'"
        raise LabError(
            f"the worker tunes whole models by themselves, and recipe {recipe.name} has {name}: take another recipe, "
            "or call distill and train on the command line"
        )


def _refuse_place(uri: str) -> None:
    infra_stores.open_store(uri)
    if uri.count(NAME) != uri.count("{"):
        raise LabError(f"a store's URI may hold {NAME} for the model's name and no other braces, got {uri}")


def _audio(given: str | bytes) -> bytes:
    """The bytes of a recording. Raises LabError where none was sent."""
    if isinstance(given, str):
        try:
            given = base64.b64decode(re.sub(r"^data:[\w/;=.+-]*,|\s+", "", given), validate=True)
        except (binascii.Error, ValueError):
            raise LabError("audio must be a file's bytes as base64, or a file in a form") from None
    if not given:
        raise LabError("audio is missing: send a file's bytes as base64, or a file in a form")
    return given


def _offered(name: str, choices: tuple[str, ...]) -> Parameter:
    field = Parameters.model_fields[name]
    kind = "file" if name == "audio" else "number" if field.annotation is float else "text"
    default = choices[0] if choices else None if kind == "file" else field.default
    return Parameter(name, field.description, default, kind, choices)
