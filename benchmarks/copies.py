"""What copying checkpoints to a store costs training: the same run without and with `--resume`, in turns.

    python benchmarks/copies.py            whisper-tiny on the tour's clips; some ten minutes on two quiet cores
    python benchmarks/copies.py --smoke    one short round: does it run? its figures mean nothing

alone     no copies
folder    to a folder of this machine
hub       to a Hub on loopback, in a process of its own (tests/servers): whole checkpoints go over a socket

`overhead` is the median over the rounds of a side's time from the first step to the last over that of `alone`, less 1.
It drowns in the noise of a busy machine, so what is behind it is told, too, in figures that other load hardly moves:

held_s    how long each checkpoint held the trainer's own thread (hard links and a note)
cpu_s     the processor time of copying one checkpoint, all threads, measured with nothing beside it
bound     (held_s + cpu_s) over the processor time of training from one checkpoint to the next at the recipe's own
          `eval_every`, without its look at validation: what copying costs where no core is ever idle

The last line is one JSON object: for each side `overhead`, `held_s`, `cpu_s`, `bound`; and `mb` of a checkpoint,
`step_cpu_s`, `eval_every`, `load`, `cores`.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from pipelines.infra import environment

environment.share_cores()
from pipelines import recipes
from pipelines.features import pipeline as feature_pipeline
from pipelines.infra import manifest
from pipelines.infra.parallel import process_pool
from pipelines.recipes import settings as recipes_settings
from pipelines.training import loop as training_loop
from pipelines.training.callbacks.progress import Progress
from pipelines.training.checkpoints import mirror as checkpoint_mirror
from pipelines.training.checkpoints import remote as checkpoint_remote
from pipelines.training.run import TrainingRun
from pipelines.whisper import model as whisper_model

HUB = """
import sys
from servers.hub import Hub
hub = Hub()
print(hub.endpoint, hub.token, flush=True)
sys.stdin.read()
"""


class Timed(checkpoint_mirror.CheckpointMirror):
    """Copies that note how long they hold the trainer, and put one checkpoint aside."""

    held_s: list[float]
    sample: Path

    def offer(self, checkpoint: Path) -> None:
        started = time.perf_counter()
        super().offer(checkpoint)
        if checkpoint.name == "model":
            return
        Timed.held_s.append(time.perf_counter() - started)
        Timed.sample = self.aside.with_name("sample") / checkpoint.name
        shutil.rmtree(Timed.sample.parent, ignore_errors=True)
        shutil.copytree(checkpoint, Timed.sample, copy_function=os.link)


def side(
    uri: str, run: Path, settings: recipes_settings.Recipe, cache: Any, base: whisper_model.ModelRef
) -> dict[str, float]:
    """One run, with copies where there is a URI: its time, and what one copy costs."""
    shutil.rmtree(run, ignore_errors=True)
    Timed.held_s, wall, cpu = [], [], []

    def mark(*_: int) -> None:
        wall.append(time.perf_counter())
        cpu.append(time.process_time())

    progress = Progress(on_start=mark, on_step=mark)
    made = training_loop.train(TrainingRun(settings, cache, base, run, progress, uri))
    steps = [after - before for before, after in itertools.pairwise(cpu)]
    found = {"train_s": wall[-1] - wall[0], "step_cpu_s": statistics.median(steps)}
    if uri:
        assert made.copies.there and not made.copies.missing, str(made.copies)
        started = time.process_time()
        checkpoint_remote.RemoteCheckpoints(f"{uri}-sample", {}).push(Timed.sample)
        found |= {"held_s": statistics.median(Timed.held_s), "cpu_s": time.process_time() - started}
    return found


@contextlib.contextmanager
def loopback_hub() -> Iterator[None]:
    """A Hub in a process of its own; the environment points to it."""
    paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    server = subprocess.Popen([sys.executable, "-c", HUB], env=os.environ | {"PYTHONPATH": paths},
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # fmt: skip
    os.environ["HF_ENDPOINT"], os.environ["HF_TOKEN"] = server.stdout.readline().split()
    os.environ["HF_HUB_OFFLINE"] = "0"
    import huggingface_hub

    huggingface_hub.constants.HF_HUB_OFFLINE = False
    try:
        yield
    finally:
        server.kill()
        server.wait()


def measure(folder: Path, model: str, steps: int, every: int, rounds: int, smoke: bool) -> dict[str, Any]:
    training_loop.CheckpointMirror = Timed
    sizes: dict[str, Any] = {"source.validation": 24, "model.base": model}
    if smoke:
        sizes |= {"source.train": 32, "source.validation": 8, "source.test": 8, "evaluation.max_new_tokens": 8}
    settings = recipes.load("tour", {**sizes, "training.steps": steps, "training.eval_every": every})
    cache = feature_pipeline.run(settings, runs=folder / "features")
    base = whisper_model.resolve(settings.model.base)
    found: dict[str, list[dict[str, float]]] = {"alone": [], "folder": [], "hub": []}
    with loopback_hub():
        for number in range(rounds):
            for name in [*found][number % 3 :] + [*found][: number % 3]:
                uri = {"alone": "", "folder": str(folder / f"shelf-{number}"), "hub": f"hub://lab/run-{number}"}[name]
                found[name].append(side(uri, folder / "run", settings, cache, base))
                told = ", ".join(f"{key} {value:.3f}" for key, value in found[name][-1].items())
                print(f"round {number + 1}: {name}: {told}; load {os.getloadavg()[0]:.1f}", flush=True)
    return result(found, recipes.load("tour").training.eval_every, Timed.sample)


def result(found: dict[str, list[dict[str, float]]], eval_every: int, sample: Path) -> dict[str, Any]:
    step_cpu_s = statistics.median(row["step_cpu_s"] for row in found["alone"])
    told: dict[str, Any] = {}
    for name in ("folder", "hub"):
        rows = list(zip(found[name], found["alone"], strict=True))
        held_s, cpu_s = (statistics.median(row[key] for row, _ in rows) for key in ("held_s", "cpu_s"))
        told[name] = {
            "overhead": round(statistics.median(row["train_s"] / alone["train_s"] for row, alone in rows) - 1, 4),
            "held_s": round(held_s, 4),
            "cpu_s": round(cpu_s, 3),
            "bound": round((held_s + cpu_s) / (eval_every * step_cpu_s), 4),
        }
    n_bytes = sum(entry["bytes"] for entry in manifest.read(sample)["files"].values())
    machine = {"load": round(os.getloadavg()[0], 1), "cores": process_pool.cores()}
    return {**told, "mb": round(n_bytes / 1e6), "step_cpu_s": round(step_cpu_s, 3), "eval_every": eval_every, **machine}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="one short round: does it run?")
    parser.add_argument("--model", default="openai/whisper-tiny")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--every", type=int, default=20, help="steps between two checkpoints")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work; some 3 GB for a while")
    options = parser.parse_args()
    if options.smoke:
        options.steps, options.every, options.rounds = 4, 2, 1
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        sizes = options.steps, options.every, options.rounds, options.smoke
        print(json.dumps(measure(Path(folder), options.model, *sizes)))


if __name__ == "__main__":
    main()
