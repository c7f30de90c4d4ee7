"""The memory that training needs, measured and estimated (`python -m pipelines doctor --recipe`), on the CPU.

    python benchmarks/memory.py            a quarter of an hour on two slow cores
    python benchmarks/memory.py --smoke    one row, to check that it runs

Each row is a process of its own: random weights of the model's shapes, batches of silence, two optimizer steps. It
measures the highest resident memory above that of the process before the model was built. The estimate is the one of
`doctor` without the memory of the process. The last line is one JSON object: `rows`, and `largest_error` of them.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import side_by_side
from pipelines import recipes
from pipelines.infra import environment
from pipelines.recipes.settings import Recipe
from pipelines.training import components
from pipelines.training.callbacks import oom
from pipelines.training.memory import base_config, estimate, simulation
from pipelines.training.memory.estimate import BatchShape, Workload

LORA = {"model.adapter": "lora"}
WINDOW = {"frames": 3000, "tokens": 448}
ROWS: tuple[tuple[str, dict[str, int], dict[str, Any]], ...] = (
    ("tiny", {}, {}),
    ("tiny", {"clips": 16}, {}),
    ("tiny", {"clips": 2, **WINDOW}, {}),
    ("tiny", {}, {"training.micro_batch": 2}),
    ("tiny", {}, {"training.accumulation": 2}),
    ("tiny", {"clips": 16}, {"training.checkpoint_activations": True}),
    ("tiny", {"clips": 16}, LORA),
    ("tiny", {"clips": 16}, {"model.freeze_encoder": True}),
    ("tiny", {}, {"model.dropout": 0.1}),
    ("tiny", {}, {"training.optimizer": "adafactor"}),
    ("tiny", {}, {"training.optimizer": "sgd"}),
    ("base", {"clips": 4}, {}),
    ("base", {"clips": 8}, {"training.checkpoint_activations": True}),
    ("small", {"clips": 2}, {}),
    ("small", {"clips": 4}, LORA),
    ("small", {"clips": 4}, LORA | {"training.checkpoint_activations": True}),
    ("tiny", {"clips": 24}, {}),
    ("tiny", {"clips": 4}, LORA),
)
"""Model, sizes of the batch that differ from 8 clips of 4 s with 30 tokens, and settings. The constants of the estimate
were fitted to all rows but the last two."""


def recipe_of(size: str, shape: BatchShape, settings: dict[str, Any]) -> Recipe:
    base = {"model.base": f"openai/whisper-{size}", "training.batch_size": shape.clips, "training.window_share": 0.0}
    return recipes.load("tour", base | settings)


def needed_bytes(size: str, shape: BatchShape, settings: dict[str, Any]) -> int:
    """Return the estimate, without the memory of the process."""
    recipe, validation = recipe_of(size, shape, settings), BatchShape(1, 200, 10)
    work = Workload((shape,), validation, decoded_tokens=10)
    needed = estimate.estimate(recipe, base_config.of_recipe(recipe), work, "cpu", "float32")
    return needed.total - estimate.PROCESS_BYTES["cpu"]


def measured_bytes(size: str, shape: BatchShape, settings: dict[str, Any]) -> int:
    """Train two steps in this process; return its highest resident memory above that before the model."""
    import psutil
    import torch
    import transformers.models.whisper.modeling_whisper  # noqa: F401  its memory is the process's

    environment.keep_freed_memory()
    recipe = recipe_of(size, shape, settings)
    config = base_config.of_recipe(recipe)
    config.apply_spec_augment = False
    before = psutil.Process().memory_info().rss
    model = estimate.random_model(recipe, config)
    optimizer = components.build_optimizer(recipe, model)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    batch = simulation.zero_batch(shape, config.num_mel_bins)
    for _ in range(2):
        for _ in range(recipe.training.accumulation):
            for piece in oom.split(batch, recipe.training.micro_batch or shape.clips):
                estimate.training_loss(model, piece, half=False).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    highest = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(highest.split()[1]) * 1024 - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one row, to check that it runs")
    parser.add_argument("--row", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        size, shape, settings = json.loads(options.row)
        return print(json.dumps(measured_bytes(size, BatchShape(**shape), settings)))
    rows = []
    for size, sizes, settings in ROWS[:1] if options.smoke else ROWS:
        shape = BatchShape(**{"clips": 8, "frames": 400, "tokens": 30} | sizes)
        row = json.dumps([size, asdict(shape), settings])
        measured = side_by_side.run_in_process(__file__, ["--row", row], {"OMP_NUM_THREADS": "1"})
        needed = needed_bytes(size, shape, settings)
        what = ", ".join(f"{name.partition('.')[2]}={value}" for name, value in settings.items())
        rows.append({"model": size, **asdict(shape), "settings": what, "measured_mb": measured // 10**6,
                     "estimated_mb": needed // 10**6, "error": round(needed / measured - 1, 3)})  # fmt: skip
        batch = f"{shape.clips} x {shape.frames / 100:g} s, {shape.tokens} tokens"
        error = f"{rows[-1]['error']:+.1%}".replace("%", " %")
        print(f"| {size} | {batch} | {what} | {measured / 1e6:,.0f} | {needed / 1e6:,.0f} | {error} |", flush=True)
    print(json.dumps({"rows": rows, "largest_error": max(abs(row["error"]) for row in rows)}))


if __name__ == "__main__":
    main()
