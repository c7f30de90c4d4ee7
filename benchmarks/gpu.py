"""Everything that needs a GPU, in one command: it writes docs/benchmarks-gpu.md.

    python benchmarks/gpu.py                     all cells, some hours; run it again to continue where it stopped
    python benchmarks/gpu.py --only precision    the cells of one table
    python benchmarks/gpu.py --smoke --docs page.md --model FOLDER     a minute, to check that it runs, also on a CPU

Every cell runs in a separate process, with a time limit. A cell that fails, runs out of memory or takes too long is a
row of its table, too. Results are kept in `results.jsonl` of the working folder; finished cells are not run again, and
the page is written after every cell. --again removes the failed ones first.

classic   Seq2SeqTrainer as in the courses (benchmarks/training.py): 30 s, activation checkpointing, fp16
ours      the lab's trainer at clip length; the estimate is that of `python -m pipelines doctor --recipe`

Clips are one, two or four joined clips of the tour: 2, 4 and 8 s on average. Samples per second are those of the
optimizer steps after the first two. Where a model's weights are not available, random weights of its shapes are used:
speed and memory are the same. `mfu` is the share of the GPU's peak, as in benchmarks/training.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import gpu_cells, training
from benchmarks.gpu_cells import Cell
from pipelines.infra import environment, manifest
from pipelines.infra.errors import LabError

SIZES = ("tiny", "small", "medium", "large-v3")
CLIPS_S = (2, 4, 8)
LORA = {"model.adapter": "lora"}
TABLES = {
    "classic": "The classic recipe and ours",
    "attention": "Attention with and without cuDNN's kernels",
    "compile": "torch.compile",
    "precision": "bfloat16 and float16",
    "memory": "Settings that save memory",
    "resume": "Kill and resume",
}
COLUMNS = {"samples_per_s": "samples per s", "peak_gb": "peak GB", "estimate_gb": "estimated GB", "mfu": "MFU"}
RESUME_COLUMNS = {
    "equal": "equal weights",
    "largest_difference": "largest difference",
    "whole_s": "whole run, s",
    "resumed_s": "resumed part, s",
}


def cells(sizes: tuple[str, ...]) -> list[Cell]:
    """Return all cells, those of small models first."""
    small, large = sizes[min(1, len(sizes) - 1)], sizes[-1]
    result = [Cell("classic", size, s, side) for size in sizes for s in CLIPS_S for side in ("classic", "ours")]
    for size in dict.fromkeys((small, large)):
        result += [
            Cell("attention", size, variant="with cuDNN"),
            Cell("attention", size, variant="without", cudnn=False),
        ]
    result += [Cell("compile", small, variant="eager"), Cell("compile", small, variant="compiled", compiled=True)]
    result += [Cell("precision", small, variant=dtype, dtype=dtype) for dtype in ("bfloat16", "float16", "float32")]
    ways = {
        "all weights": {},
        "activation checkpointing": {"training.checkpoint_activations": True},
        "LoRA": LORA,
        "LoRA, 8-bit base": LORA | {"model.load_in_8bit": True},
        "LoRA, 8-bit base, activation checkpointing": LORA
        | {"model.load_in_8bit": True, "training.checkpoint_activations": True},
        "frozen encoder": {"model.freeze_encoder": True},
    }
    result += [Cell("memory", large, variant=way, overrides=tuple(over.items())) for way, over in ways.items()]
    return [*result, Cell("resume", sizes[0])]


def smoke_cells(sizes: tuple[str, ...]) -> list[Cell]:
    """Return a cell of each kind that a CPU can run, and one that needs a GPU."""
    kinds = {"classic tiny 2s classic", "classic tiny 2s ours", "precision tiny 4s ours bfloat16",
             "memory tiny 4s ours LoRA, 8-bit base", "resume tiny 4s ours"}  # fmt: skip
    return [cell for cell in cells(sizes) if cell.name in kinds]


def run_in_process(cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    """Run a cell in a new process; return its result, or the reason of its failure as `failed`."""
    command = [sys.executable, __file__, *options.forwarded, "--cell", json.dumps(dataclasses.asdict(cell))]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, errors = process.communicate(timeout=options.timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return {"failed": f"not finished after {options.timeout_s:g} s"}
    if process.returncode == 0:
        return json.loads(out.splitlines()[-1])
    lines = [line for line in errors.splitlines() if line.strip()]
    return {"failed": lines[-1][:200] if lines else f"exit code {process.returncode}"}


def all_cells(options: argparse.Namespace) -> list[Cell]:
    return smoke_cells(options.sizes) if options.smoke else cells(options.sizes)


def selected_cells(options: argparse.Namespace) -> list[Cell]:
    return [cell for cell in all_cells(options) if not options.only or cell.table == options.only]


def measure_all(options: argparse.Namespace) -> None:
    """Run the cells that have no result yet, and write the page after each."""
    path, device = options.folder / "results.jsonl", training._device()
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    results = {row["cell"]: row for row in map(json.loads, lines) if row["device"] == device}
    if options.again:
        results = {name: row for name, row in results.items() if "failed" not in row}
    selected = selected_cells(options)
    for number, cell in enumerate(selected, 1):
        if cell.name not in results:
            started = time.monotonic()
            row = {"cell": cell.name, "device": device, **run_in_process(cell, options)}
            results[cell.name] = row | {"seconds": round(time.monotonic() - started, 1)}
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(results[cell.name]) + "\n")
        print(f"{number} of {len(selected)}: {json.dumps(results[cell.name])}", flush=True)
        manifest.write_bytes(options.docs, page(all_cells(options), results, options).encode())
    print(json.dumps({"cells": len(selected), "failed": sum("failed" in results[cell.name] for cell in selected)}))


def page(listed: list[Cell], results: dict[str, dict[str, Any]], options: argparse.Namespace) -> str:
    """Return the page: a table for each entry of TABLES."""
    import torch
    import transformers

    lines = [
        "# Benchmarks on a GPU",
        "",
        f"Written by `python benchmarks/gpu.py` on {datetime.now(UTC):%Y-%m-%d}: {training._device()}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}. Batches of {options.batch}, {options.steps} "
        "steps. The sides are described in [benchmarks/gpu.py](../benchmarks/gpu.py).",
        "",
    ]
    for table, title in TABLES.items():
        rows = [(cell, results[cell.name]) for cell in listed if cell.table == table and cell.name in results]
        columns = RESUME_COLUMNS if table == "resume" else COLUMNS
        head = ["model", "weights", "clips", "side", *columns.values()]
        if rows:
            lines += [f"## {title}", "", _row(head), _row(["---"] * len(head))]
        for cell, row in rows:
            values = [str(row.get(name, "")) for name in columns]
            if "failed" in row:
                values = [f"failed: {row['failed']}".replace("|", "/"), *[""] * (len(columns) - 1)]
            lines += [_row([cell.size, row.get("weights", ""), f"{cell.clip_s} s", cell.variant or cell.side, *values])]
        lines += [""] if rows else []
    return "\n".join(lines)


def _row(values: list[str]) -> str:
    return f"| {' | '.join(values)} |"


def main(arguments: list[str] | None = None) -> None:
    options = _options(arguments)
    if options.fit:
        return gpu_cells.fit(json.loads(options.fit))
    if options.cell:
        fields = json.loads(options.cell)
        cell = Cell(**fields | {"overrides": tuple(map(tuple, fields["overrides"]))})
        try:
            return print(json.dumps(gpu_cells.run_cell(cell, options)))
        except (LabError, RuntimeError, ValueError, ImportError) as error:  # one line for the table
            sys.exit((str(error).splitlines() or [type(error).__name__])[0])
    if options.dry_run:
        for cell in selected_cells(options):
            print(cell.name)
        return print("nothing was measured")
    if environment.detect().device != "cuda" and not options.smoke:
        sys.exit("this benchmark needs an NVIDIA GPU, and this machine has none: --smoke runs it small on a CPU")
    measure_all(options)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a minute, to check that it runs, also on a CPU")
    parser.add_argument("--only", choices=TABLES, help="the cells of one table")
    parser.add_argument("--dry-run", action="store_true", help="list the cells and exit")
    parser.add_argument("--again", action="store_true", help="run the cells again that failed")
    parser.add_argument("--sizes", default=",".join(SIZES), help=f"of the models; default: {','.join(SIZES)}")
    parser.add_argument("--model", default="", help="folder of a model to take for every size")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--clips", type=int, default=480, help="training clips of each length")
    parser.add_argument("--timeout-s", type=float, default=1800.0, help="time limit of a cell")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "benchmarks-gpu.md", help="the page to write")
    parser.add_argument("--folder", type=Path, default=None, help="working folder; default: benchmarks-gpu in runs")
    for hidden in ("--cell", "--fit"):
        parser.add_argument(hidden, default="", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.smoke:
        options.steps, options.batch, options.clips, options.sizes = 4, 4, 16, "tiny"
    options.sizes = tuple(options.sizes.split(","))
    options.folder = options.folder or environment.runs_folder() / "benchmarks-gpu"
    options.stamp = time.time_ns()
    values = {name: getattr(options, name) for name in ("batch", "steps", "clips", "folder", "model")}
    options.forwarded = [
        *(["--smoke"] if options.smoke else []),
        *(f"--{name}={value}" for name, value in values.items()),
    ]
    return options


if __name__ == "__main__":
    main()
