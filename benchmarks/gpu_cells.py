"""One measurement of benchmarks/gpu.py, which runs it in a separate process."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks import flops, recordings, training
from pipelines import recipes
from pipelines.features import pipeline as feature_pipeline
from pipelines.features.cache import FeatureCache
from pipelines.infra import environment
from pipelines.infra.errors import LabError
from pipelines.recipes.settings import Recipe
from pipelines.training import components
from pipelines.training import loop as training_loop
from pipelines.training.callbacks.progress import Progress
from pipelines.training.memory import base_config, report
from pipelines.training.run import TrainingRun
from pipelines.whisper import model as whisper_model

SCRIPT = Path(__file__).with_name("gpu.py")
KILL_AT = 12
"""Step at which the run is killed that is then resumed; it saves a checkpoint every ten steps."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One measurement."""

    table: str
    size: str
    clip_s: int = 4
    side: str = "ours"
    variant: str = ""
    overrides: tuple[tuple[str, Any], ...] = ()
    cudnn: bool = True
    """Whether attention may use cuDNN's kernels."""
    compiled: bool = False
    dtype: str = ""
    """Training precision; empty: the device's fastest."""

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.table, self.size, f"{self.clip_s}s", self.side, self.variant)))


class Measured(Exception):
    """Enough steps are timed."""


def run_cell(cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    """Measure a cell in this process."""
    base, weights = base_model(cell.size, options)
    recipe = recipe_of(cell, base, options)
    cache = corpus(cell, recipe, options)
    if cell.table == "resume":
        return {"weights": weights, **resume(recipe, cache, options)}
    measure = measure_classic if cell.side == "classic" else measure_ours
    with variant(cell):
        rate, peak_mb = measure(recipe, cache, options)
    result = {"weights": weights, "samples_per_s": round(rate, 2), "peak_gb": round(peak_mb / 1e3, 2)}
    if cell.side == "ours":
        needed = report.examine(recipe, runs=options.folder / "runs", cache=cache.uri).estimate
        result["estimate_gb"] = round((needed.total - needed.overhead) / 1e9, 2)
    if peak := flops.peak_of(training._device()):
        result["mfu"] = round(rate * flops.flops_per_example(recipe, cache, full=cell.side == "classic") / peak, 4)
    return result


@contextlib.contextmanager
def variant(cell: Cell) -> Iterator[None]:
    """Set the kernels, the precision and the compilation of a cell."""
    import torch

    torch.backends.cuda.enable_cudnn_sdp(cell.cudnn)
    machine, build = environment.detect(), components.build_model

    def compiled(*arguments: Any) -> Any:
        model = build(*arguments)
        model.compile(dynamic=True)
        return model

    with contextlib.ExitStack() as stack:
        if cell.dtype:
            changed = dataclasses.replace(machine, dtype=cell.dtype)
            stack.enter_context(mock.patch.object(environment, "detect", return_value=changed))
        if cell.compiled:
            stack.enter_context(mock.patch.object(components, "build_model", compiled))
        yield


def measure_ours(recipe: Recipe, cache: FeatureCache, options: argparse.Namespace) -> tuple[float, float]:
    """Return samples per second and peak MB of the lab's trainer; it is stopped before it validates."""
    clock = training._Clock()

    def on_step(step: int) -> None:
        clock(step)
        if step == options.steps:
            raise Measured

    base, settings = whisper_model.resolve(recipe.model.base), recipe.training
    longer = {"steps": options.steps + 1, "eval_every": options.steps + 1}
    recipe = recipe.model_copy(update={"training": settings.model_copy(update=longer)})
    folder = options.folder / "run" / str(time.time_ns())
    with contextlib.suppress(Measured):
        training_loop.train(TrainingRun(recipe, cache, base, folder, Progress(on_step=on_step)))
    shutil.rmtree(folder, ignore_errors=True)
    return clock.rate(settings.batch_size * settings.accumulation), training._peak_mb()


def measure_classic(recipe: Recipe, cache: FeatureCache, options: argparse.Namespace) -> tuple[float, float]:
    """Return samples per second and peak MB of the classic recipe."""
    side = training.run_classic(recipe, cache, options.folder / "classic")
    return side.examples_per_s, side.peak_mb


def resume(recipe: Recipe, cache: FeatureCache, options: argparse.Namespace) -> dict[str, Any]:
    """Train a run that is killed and resumed, and one that is not; return how their weights differ."""
    from safetensors.torch import load_file

    runs, seconds = {}, {}
    for name, kills in (("whole", (0,)), ("killed", (KILL_AT, 0))):
        for kill_at in kills:
            job = {"recipe": recipe.model_dump(mode="json"), "cache": cache.uri, "kill_at": kill_at}
            job["folder"] = str(options.folder / "run" / f"{name}-{options.stamp}")
            started = time.monotonic()
            done = subprocess.run(
                [sys.executable, str(SCRIPT), "--fit", json.dumps(job)], stdout=subprocess.PIPE, text=True
            )
            seconds[f"{name} {kill_at}"] = time.monotonic() - started
            if done.returncode != (-signal.SIGKILL if kill_at else 0):
                raise LabError(f"the {name} run ended with exit code {done.returncode}")
        runs[name] = load_file(Path(done.stdout.splitlines()[-1]) / "model.safetensors")
    difference = max(float((runs["whole"][name] - runs["killed"][name]).abs().max()) for name in runs["whole"])
    return {
        "largest_difference": difference,
        "equal": difference == 0,
        "whole_s": round(seconds["whole 0"], 1),
        "resumed_s": round(seconds["killed 0"], 1),
    }


def fit(job: dict[str, Any]) -> None:
    """Train a run to its end, or kill this process at a step; print the model's folder."""

    def on_step(step: int) -> None:
        if step == job["kill_at"]:
            os.kill(os.getpid(), signal.SIGKILL)

    recipe = Recipe(**job["recipe"])
    cache, base = feature_pipeline.open_cache(recipe, job["cache"]), whisper_model.resolve(recipe.model.base)
    print(training_loop.train(TrainingRun(recipe, cache, base, Path(job["folder"]), Progress(on_step=on_step))).uri)


def recipe_of(cell: Cell, base: str, options: argparse.Namespace) -> Recipe:
    steps = 2 * KILL_AT if cell.table == "resume" else options.steps
    return recipes.load(
        "tour",
        {
            "source": {"kind": "folder", "path": str(clips_folder(cell, options))},
            "model.base": base,
            "training.batch_size": options.batch,
            "training.steps": steps,
            "training.eval_every": 10 if cell.table == "resume" else steps,
            "training.window_share": 0.0,
            "evaluation.max_new_tokens": 8,
            **dict(cell.overrides),
        },
    )


def corpus(cell: Cell, recipe: Recipe, options: argparse.Namespace) -> FeatureCache:
    """Return the cache of clips of about `cell.clip_s` seconds, with the features that the model takes."""
    joined = cell.clip_s // 2
    sizes = {"train": options.clips * joined, "validation": 8 * joined, "test": 8 * joined}
    folder = clips_folder(cell, options)
    if not (folder / "transcripts.csv").exists():
        folder.mkdir(parents=True, exist_ok=True)
        recordings.write_pairs(folder, sizes, joined)
    return feature_pipeline.run(recipe, runs=options.folder / "runs")


def clips_folder(cell: Cell, options: argparse.Namespace) -> Path:
    return options.folder / f"clips-{cell.clip_s}s"


def base_model(size: str, options: argparse.Namespace) -> tuple[str, str]:
    """Return the folder of a model's weights, and whether they are `trained` or `random`."""
    if options.model:
        return options.model, "as given"
    try:
        return str(whisper_model.resolve(f"openai/whisper-{size}").folder), "trained"
    except LabError:
        return str(random_model(size, options.folder / f"whisper-{size}")), "random"


def random_model(size: str, folder: Path) -> Path:
    """Write random weights of a size's shapes in half precision, with the tokenizer of whisper-tiny."""
    import torch
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    if (folder / "model.safetensors").exists():
        return folder
    tiny = whisper_model.resolve("openai/whisper-tiny")
    special = WhisperConfig.from_pretrained(tiny.folder).to_dict()
    ids = {name: special[name] for name in special if name.endswith("token_id")}
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(base_config.of_size(size, **ids)).half()
    processor = whisper_model.load_processor(tiny, "sv")
    processor.feature_extractor = WhisperFeatureExtractor(feature_size=model.config.num_mel_bins)
    model.generation_config.eos_token_id = ids["eos_token_id"]
    whisper_model.save(model, processor, folder)
    return folder
