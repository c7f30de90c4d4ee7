"""Cost of copying checkpoints to a store: the same training run without and with `--resume`.

    python benchmarks/copies.py            whisper-tiny on the tour's clips; some ten minutes on two quiet cores
    python benchmarks/copies.py --smoke    one short round, to check that it runs; the figures mean nothing

alone     no copies
folder    to a folder of this machine
hub       to a Hub on loopback in another process (tests/servers): complete checkpoints are sent over a socket

`overhead` is the median over the rounds of a side's time from the first step to the last, divided by that of `alone`,
minus 1. On a busy machine it is mostly noise, so figures that depend little on other load are reported as well:

held_s    time for which a checkpoint blocks the training thread (hard links and a note)
cpu_s     CPU time of copying one checkpoint, all threads, measured alone
bound     (held_s + cpu_s) over the CPU time of training between two checkpoints at the recipe's `eval_every`, without
          validation: the cost of copying if no core is ever idle

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
    """A mirror that records how long it blocks the trainer, and keeps a sample checkpoint."""

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
    """Train once, with copies if there is a URI; return its time and the cost of one copy."""
    shutil.rmtree(run, ignore_errors=True)
    Timed.held_s, wall, cpu = [], [], []

    def mark(*_: int) -> None:
        wall.append(time.perf_counter())
        cpu.append(time.process_time())

    progress = Progress(on_start=mark, on_step=mark)
    trained = training_loop.train(TrainingRun(settings, cache, base, run, progress, uri))
    steps = [after - before for before, after in itertools.pairwise(cpu)]
    figures = {"train_s": wall[-1] - wall[0], "step_cpu_s": statistics.median(steps)}
    if uri:
        assert trained.copies.there and not trained.copies.missing, str(trained.copies)
        started = time.process_time()
        checkpoint_remote.RemoteCheckpoints(f"{uri}-sample", {}).push(Timed.sample)
        figures |= {"held_s": statistics.median(Timed.held_s), "cpu_s": time.process_time() - started}
    return figures


@contextlib.contextmanager
def loopback_hub() -> Iterator[None]:
    """Run a Hub in another process and point the environment to it."""
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
    sides: dict[str, list[dict[str, float]]] = {"alone": [], "folder": [], "hub": []}
    with loopback_hub():
        for number in range(rounds):
            for name in [*sides][number % 3 :] + [*sides][: number % 3]:
                uri = {"alone": "", "folder": str(folder / f"shelf-{number}"), "hub": f"hub://lab/run-{number}"}[name]
                sides[name].append(side(uri, folder / "run", settings, cache, base))
                figures = ", ".join(f"{key} {value:.3f}" for key, value in sides[name][-1].items())
                print(f"round {number + 1}: {name}: {figures}; load {os.getloadavg()[0]:.1f}", flush=True)
    return result(sides, recipes.load("tour").training.eval_every, Timed.sample)


def result(sides: dict[str, list[dict[str, float]]], eval_every: int, sample: Path) -> dict[str, Any]:
    step_cpu_s = statistics.median(row["step_cpu_s"] for row in sides["alone"])
    costs: dict[str, Any] = {}
    for name in ("folder", "hub"):
        rows = list(zip(sides[name], sides["alone"], strict=True))
        held_s, cpu_s = (statistics.median(row[key] for row, _ in rows) for key in ("held_s", "cpu_s"))
        costs[name] = {
            "overhead": round(statistics.median(row["train_s"] / alone["train_s"] for row, alone in rows) - 1, 4),
            "held_s": round(held_s, 4),
            "cpu_s": round(cpu_s, 3),
            "bound": round((held_s + cpu_s) / (eval_every * step_cpu_s), 4),
        }
    n_bytes = sum(entry["bytes"] for entry in manifest.read(sample)["files"].values())
    machine = {"load": round(os.getloadavg()[0], 1), "cores": process_pool.cores()}
    return {
        **costs,
        "mb": round(n_bytes / 1e6),
        "step_cpu_s": round(step_cpu_s, 3),
        "eval_every": eval_every,
        **machine,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="one short round, to check that it runs")
    parser.add_argument("--model", default="openai/whisper-tiny")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--every", type=int, default=20, help="steps between two checkpoints")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="working folder; needs some 3 GB")
    options = parser.parse_args()
    if options.smoke:
        options.steps, options.every, options.rounds = 4, 2, 1
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        sizes = options.steps, options.every, options.rounds, options.smoke
        print(json.dumps(measure(Path(folder), options.model, *sizes)))


if __name__ == "__main__":
    main()
