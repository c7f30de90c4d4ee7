"""Training and validation compared with the classic recipe: same clips, weights and number of examples.

    python benchmarks/training.py            the tour with whisper-tiny: half an hour on two slow cores
    python benchmarks/training.py --smoke    a minute, to check that it runs; the figures mean nothing
    python benchmarks/training.py --model FOLDER --batch 16 --steps 200 --speed-only      speed of other weights

classic   Seq2SeqTrainer as in the courses: features padded to 30 s, batches drawn at random, activation checkpointing,
          fp16 on a GPU; validation by `predict_with_generate` in batches of 8
ours      the lab's training on the lab's cache: batches padded to their longest clip, from length buckets; validation
          as between checkpoints: transcripts and loss

Both use the same frames (the cache rebuilds the padded tensors), labels, learning rate and warm-up, and the same limit
of tokens. Each side runs in a separate process. Examples per second are those of the optimizer steps after the first
two, without validation, saving and start-up. There are two corpora: the tour's clips (2 s on average), trained to the
end, with the WER of both sides on the validation split; and pairs of clips joined (4 s), for speed only.

The last line is one JSON object: `speedup` and `speedup_4s` (examples per second, ours over classic), `eval_speedup`,
`wer_classic`, `wer_ours`, `delta_wer_ci95` (ours minus classic, paired, by speaker), `memory_ratio` (peak, ours over
classic), `device`. On a GPU with a known peak also `mfu`: the share of the peak that each side uses for the arithmetic
of the model (Chowdhery et al. 2022) at the lengths of its batches, including padding, without recomputation.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import flops, recordings, side_by_side
from pipelines import recipes
from pipelines.features import pipeline as feature_pipeline
from pipelines.features.cache import FeatureCache
from pipelines.infra import environment
from pipelines.recipes.settings import Recipe
from pipelines.speech import (
    scoring,
)
from pipelines.training import loop as training_loop
from pipelines.training import validation
from pipelines.training.callbacks.progress import Progress
from pipelines.training.run import TrainingRun
from pipelines.whisper import decoding
from pipelines.whisper import model as whisper_model

UNTIMED_STEPS = 2
"""Steps that are not timed: kernels are selected and memory is allocated."""
CLASSIC_EVAL_BATCH = 8


@dataclasses.dataclass(frozen=True)
class Side:
    """Results of one side."""

    examples_per_s: float
    eval_s: float
    """Seconds of one validation."""
    peak_mb: float
    """Peak memory of the process; on a GPU that of the device."""
    transcripts: list[str]
    """Transcripts of the validation split."""


def main() -> None:
    options = _options()
    if options.side:
        recipe = recipes.load("tour", json.loads(options.overrides))
        side = SIDES[options.side](recipe, feature_pipeline.open_cache(recipe, options.cache), options.folder)
        return print(json.dumps(dataclasses.asdict(side)))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = measure(Path(folder), options)
    print(json.dumps(result))


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    sizes = {"train": 960, "validation": 120, "test": 8}
    if options.smoke:
        sizes = {"train": 64, "validation": 8, "test": 8}
    overrides = {f"source.{split}": n for split, n in sizes.items()} | {
        "model.base": options.model,
        "training.steps": options.steps,
        "training.eval_every": options.steps,
        "training.batch_size": options.batch,
        "training.learning_rate": options.learning_rate,
        "evaluation.max_new_tokens": 32 if options.smoke else 64,
    }
    print(
        f"{options.model}, {environment.detect().device}, {options.steps} steps of {options.batch} examples", flush=True
    )
    short = feature_pipeline.run(recipes.load("tour", overrides), runs=folder / "runs")
    classic, ours = run_both(folder, overrides, short, "2 s")
    (folder / "pairs").mkdir()
    joined = {name: value for name, value in overrides.items() if not name.startswith("source.")} | {
        "source.kind": "folder",
        "source.path": str(recordings.write_pairs(folder / "pairs", sizes)),
        "training.steps": min(options.steps, options.steps_4s),
        "training.eval_every": min(options.steps, options.steps_4s),
    }
    longer = feature_pipeline.run(recipes.load("tour", joined), runs=folder / "runs")
    classic_4s, ours_4s = run_both(folder, joined, longer, "4 s")
    return {
        "speedup": round(ours.examples_per_s / classic.examples_per_s, 2),
        "speedup_4s": round(ours_4s.examples_per_s / classic_4s.examples_per_s, 2),
        "eval_speedup": round(classic.eval_s / ours.eval_s, 2),
        "memory_ratio": round(ours.peak_mb / classic.peak_mb, 3),
        "device": _device(),
        **utilisation({"": (short, overrides, classic, ours), "_4s": (longer, joined, classic_4s, ours_4s)}),
        **({} if options.speed_only else compare_wer(short, classic, ours)),
    }


def run_both(folder: Path, overrides: dict[str, Any], cache: FeatureCache, label: str) -> tuple[Side, Side]:
    """Run the two sides one after the other, each in a separate process."""
    sides = []
    for name in SIDES:
        side_folder = folder / f"{name} {label}"
        side_folder.mkdir()
        side = _run_side(name, overrides, cache, side_folder)
        print(
            f"{label} clips, {name:8}{side.examples_per_s:8.2f} examples/s, validation {side.eval_s:6.1f} s, "
            f"peak {side.peak_mb:7,.0f} MB; load {os.getloadavg()[0]:.1f}",
            flush=True,
        )
        sides.append(side)
    return tuple(sides)


def compare_wer(cache: FeatureCache, classic: Side, ours: Side) -> dict[str, Any]:
    """Return the WER of both on the validation split, and the interval of their difference."""
    rows = cache.rows.iloc[cache.split("validation")]
    texts, speakers = rows["text"].tolist(), rows["speaker"].tolist()
    for name, side in (("classic", classic), ("ours", ours)):
        print(f"{name:8}{scoring.score(texts, side.transcripts, speakers)}")
    edits = [scoring.count_edits(texts, side.transcripts) for side in (ours, classic)]
    difference = scoring.difference(*edits, speakers)
    print(f"ours minus classic: {difference}, paired")
    wer_ours, wer_classic = (float(side.word_edits.sum() / side.words.sum()) for side in edits)
    return {
        "wer_classic": round(wer_classic, 4),
        "wer_ours": round(wer_ours, 4),
        "delta_wer_ci95": difference.ci95 and [round(limit, 4) for limit in difference.ci95],
    }


def utilisation(corpora: dict[str, tuple[FeatureCache, dict[str, Any], Side, Side]]) -> dict[str, Any]:
    """Return `mfu` of both sides on each corpus; empty without a GPU with a known peak."""
    peak = flops.peak_of(_device())
    if not peak:
        return {}
    mfu = {}
    for label, (cache, overrides, classic, ours) in corpora.items():
        recipe = recipes.load("tour", overrides)
        for name, side in (("classic", classic), ("ours", ours)):
            share = side.examples_per_s * flops.flops_per_example(recipe, cache, full=name == "classic") / peak
            mfu[f"{name}{label}"] = round(share, 4)
            print(f"{name}{label}: {share:.2%} of {peak / 1e12:.0f} TFLOP/s")
    return {"mfu": mfu}


# --- the sides --------------------------------------------------------------------------------------------------------


def run_classic(recipe: Recipe, cache: FeatureCache, folder: Path) -> Side:
    """Train with the stock Trainer and arguments; the recipe gives weights, batch size, steps and learning rate."""
    import torch
    import transformers

    base = whisper_model.resolve(recipe.model.base)
    processor = whisper_model.load_processor(base, recipe.language)
    transformers.set_seed(recipe.training.seed)
    model = transformers.WhisperForConditionalGeneration.from_pretrained(base.folder, dtype=torch.float32)
    whisper_model.set_language(model, recipe.language)
    on_gpu = torch.cuda.is_available()
    steps = recipe.training.steps
    arguments = transformers.Seq2SeqTrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=recipe.training.batch_size,
        per_device_eval_batch_size=CLASSIC_EVAL_BATCH,
        learning_rate=recipe.training.learning_rate,
        warmup_steps=recipe.training.warmup_steps,
        gradient_checkpointing=True,
        fp16=on_gpu,
        eval_strategy="no",
        save_strategy="no",
        predict_with_generate=True,
        # the prompt of four tokens counts
        generation_max_length=recipe.evaluation.max_new_tokens + 4,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not on_gpu,
    )
    clock = _Clock()

    class Steps(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock(state.global_step)

    trainer = transformers.Seq2SeqTrainer(
        model=model,
        args=arguments,
        train_dataset=Padded(cache, "train"),
        eval_dataset=Padded(cache, "validation"),
        data_collator=collate_padded,
        processing_class=processor,
        callbacks=[Steps()],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    started = time.perf_counter()
    predicted = trainer.predict(trainer.eval_dataset).predictions
    seconds = time.perf_counter() - started
    predicted = np.where(predicted < 0, processor.tokenizer.pad_token_id, predicted)
    texts = processor.tokenizer.batch_decode(predicted, skip_special_tokens=True)
    return Side(clock.rate(recipe.training.batch_size), seconds, _peak_mb(), [text.strip() for text in texts])


def run_ours(recipe: Recipe, cache: FeatureCache, folder: Path) -> Side:
    clock = _Clock()
    base = whisper_model.resolve(recipe.model.base)
    trained = training_loop.train(TrainingRun(recipe, cache, base, folder / "run", Progress(on_step=clock)))
    rate = clock.rate(recipe.training.batch_size * recipe.training.accumulation)
    ref = whisper_model.resolve(trained.uri)
    model = whisper_model.load(ref, device=environment.detect().device)
    processor = whisper_model.load_processor(ref, recipe.language)
    full_context = recipe.training.context == "full"
    validate = validation.validator(recipe, cache, processor, full_context)
    started = time.perf_counter()
    validate(model)
    seconds = time.perf_counter() - started
    options = decoding.RowDecodingOptions(
        recipe.language,
        recipe.evaluation.max_new_tokens,
        full_context=full_context,
        batch_frames=recipe.evaluation.batch_frames,
    )
    transcripts = decoding.decode_rows_to_text(model, processor, cache, cache.split("validation"), options)
    return Side(rate, seconds, _peak_mb(), transcripts)


SIDES = {"classic": run_classic, "ours": run_ours}


class Padded:
    """The data set that `Dataset.map` with the stock extractor makes: 30 s tensors, labels without start token."""

    def __init__(self, cache: FeatureCache, split: str):
        self.cache, self.rows = cache, cache.split(split)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> dict[str, Any]:
        row = int(self.rows[position])
        return {"input_features": self.cache.log_mel(row).padded(), "labels": self.cache.labels(row)}


def collate_padded(clips: list[dict[str, Any]]) -> dict[str, Any]:
    """Return float32 [B, n_mels, 3000], and labels padded with -100."""
    import torch

    longest = max(len(clip["labels"]) for clip in clips)
    return {
        "input_features": torch.from_numpy(np.stack([clip["input_features"] for clip in clips])),
        "labels": torch.tensor([[*clip["labels"], *[-100] * (longest - len(clip["labels"]))] for clip in clips]),
    }


class _Clock:
    """Records when each optimizer step ended."""

    def __init__(self):
        self.marks: dict[int, float] = {}

    def __call__(self, step: int) -> None:
        self.marks[step] = time.perf_counter()

    def rate(self, examples: int) -> float:
        """Return examples per second after the warm-up steps, with `examples` per step."""
        first, last = min(UNTIMED_STEPS, max(self.marks) - 1), max(self.marks)
        return (last - first) * examples / (self.marks[last] - self.marks[first])


def _peak_mb() -> float:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {os.cpu_count()} cores"


def _run_side(name: str, overrides: dict[str, Any], cache: FeatureCache, folder: Path) -> Side:
    arguments = ["--side", name, "--overrides", json.dumps(overrides), "--cache", cache.uri, "--folder", str(folder)]
    # for both sides, waiting threads sleep: a spinning thread would take a core from other processes
    variables = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    return Side(**side_by_side.run_in_process(__file__, arguments, variables))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a minute, to check that it runs")
    parser.add_argument("--model", default="openai/whisper-tiny")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--steps-4s", type=int, default=30, help="steps on the joined clips, for speed only")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--speed-only", action="store_true", help="no word error rates")
    parser.add_argument("--folder", type=Path, default=None, help="working folder; default: the temporary folder")
    for hidden in ("--side", "--overrides", "--cache"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.smoke:
        options.steps, options.batch = 4, 4
    return options


if __name__ == "__main__":
    main()
