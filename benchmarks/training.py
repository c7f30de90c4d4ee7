"""Training and validation against the classic recipe: same clips, same weights, same number of examples, in one go.

    python benchmarks/training.py            the tour with whisper-tiny: half an hour on two slow cores
    python benchmarks/training.py --smoke    a minute: does it run? its figures mean nothing
    python benchmarks/training.py --model FOLDER --batch 16 --steps 200 --speed-only      speed of other weights

classic   Seq2SeqTrainer as in the courses: features padded to 30 s, batches drawn at random, activation checkpointing,
          fp16 on a GPU; validation by `predict_with_generate` in batches of 8
ours      the lab's own `training.train` on the lab's cache: batches of their longest clip, from length buckets;
          validation as it is done between checkpoints: transcripts and loss

Both learn from the very same frames (the cache rebuilds the padded tensors), labels, learning rate and warm-up, and may
write the same number of tokens. Each side runs in a process of its own. Examples per second are those of the optimizer
steps after the first two; validation, saving and starting are left out. Two corpora: the tour's clips (2 s on average),
trained to the end, with the WER of both on the validation split; and pairs of them joined (4 s), for speed alone.

The last line is one JSON object: `speedup` and `speedup_4s` (examples per second, ours over classic), `eval_speedup`,
`wer_classic`, `wer_ours`, `delta_wer_ci95` (ours less classic, paired, by speaker), `memory_ratio` (peak, ours over
classic), `device`. On a GPU whose peak is known also `mfu`: the share of it that each side turns into the model's own
arithmetic (Chowdhery et al. 2022), at the lengths that its batches have, padding counted, recomputation not.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from pipelines import recipes
from pipelines.features import pipeline as feature_pipeline
from pipelines.features.cache import FeatureCache
from pipelines.features.sources import SPLITS
from pipelines.features.sources.synthetic.tour import TourSource
from pipelines.infra import environment
from pipelines.recipes.settings import Recipe
from pipelines.speech import (
    audio,
    scoring,
)
from pipelines.training import loop as training_loop
from pipelines.training import validation
from pipelines.training.callbacks.progress import Progress
from pipelines.training.run import TrainingRun
from pipelines.whisper import decoding
from pipelines.whisper import model as whisper_model
from pipelines.whisper.batching import (
    bucketed,
    padded_frames,
)
from pipelines.whisper.log_mel import FULL_FRAMES

WARM_STEPS = 2
"""Steps that are not timed: kernels are chosen, memory is fetched."""
CLASSIC_EVAL_BATCH = 8
PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "V100": 125e12,
    "T4": 65e12,
}
"""Dense half-precision matrix FLOP per second by NVIDIA's data sheets, by a word of the device's name."""


@dataclasses.dataclass(frozen=True)
class Side:
    """What one side told of itself."""

    examples_per_s: float
    eval_s: float
    """Seconds of one look at the validation split."""
    peak_mb: float
    """Of the process; on a GPU that of the device's memory."""
    transcripts: list[str]
    """Of the validation split."""


def main() -> None:
    options = _options()
    if options.side:
        given = recipes.load("tour", json.loads(options.overrides))
        side = SIDES[options.side](given, feature_pipeline.open_cache(given, options.cache), options.folder)
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
    classic, ours = both(folder, overrides, short, "2 s")
    (folder / "pairs").mkdir()
    joined = {name: value for name, value in overrides.items() if not name.startswith("source.")} | {
        "source.kind": "folder",
        "source.path": str(pairs(folder / "pairs", sizes)),
        "training.steps": min(options.steps, options.steps_4s),
        "training.eval_every": min(options.steps, options.steps_4s),
    }
    longer = feature_pipeline.run(recipes.load("tour", joined), runs=folder / "runs")
    classic_4s, ours_4s = both(folder, joined, longer, "4 s")
    return {
        "speedup": round(ours.examples_per_s / classic.examples_per_s, 2),
        "speedup_4s": round(ours_4s.examples_per_s / classic_4s.examples_per_s, 2),
        "eval_speedup": round(classic.eval_s / ours.eval_s, 2),
        "memory_ratio": round(ours.peak_mb / classic.peak_mb, 3),
        "device": _device(),
        **utilisation({"": (short, overrides, classic, ours), "_4s": (longer, joined, classic_4s, ours_4s)}),
        **({} if options.speed_only else compared(short, classic, ours)),
    }


def both(folder: Path, overrides: dict[str, Any], cache: FeatureCache, label: str) -> tuple[Side, Side]:
    """The two sides, one after the other, each in a process of its own."""
    sides = []
    for name in SIDES:
        place = folder / f"{name} {label}"
        place.mkdir()
        side = _elsewhere(name, overrides, cache, place)
        print(
            f"{label} clips, {name:8}{side.examples_per_s:8.2f} examples/s, validation {side.eval_s:6.1f} s, "
            f"peak {side.peak_mb:7,.0f} MB; load {os.getloadavg()[0]:.1f}",
            flush=True,
        )
        sides.append(side)
    return tuple(sides)


def compared(cache: FeatureCache, classic: Side, ours: Side) -> dict[str, Any]:
    """WER of both on the validation split, and the interval of their difference."""
    rows = cache.rows.iloc[cache.split("validation")]
    texts, speakers = rows["text"].tolist(), rows["speaker"].tolist()
    for name, side in (("classic", classic), ("ours", ours)):
        print(f"{name:8}{scoring.score(texts, side.transcripts, speakers)}")
    edits = [scoring.count_edits(texts, side.transcripts) for side in (ours, classic)]
    found = scoring.difference(*edits, speakers)
    print(f"ours less classic: {found}, paired")
    wer_ours, wer_classic = (float(side.word_edits.sum() / side.words.sum()) for side in edits)
    return {
        "wer_classic": round(wer_classic, 4),
        "wer_ours": round(wer_ours, 4),
        "delta_wer_ci95": [round(limit, 4) for limit in found.ci95],
    }


def utilisation(corpora: dict[str, tuple[FeatureCache, dict[str, Any], Side, Side]]) -> dict[str, Any]:
    """`mfu` of both sides on each corpus; nothing without a GPU, or where its peak is not known."""
    peak = peak_of(_device())
    if not peak:
        return {}
    found = {}
    for label, (cache, overrides, classic, ours) in corpora.items():
        given = recipes.load("tour", overrides)
        for name, side in (("classic", classic), ("ours", ours)):
            share = side.examples_per_s * flops_per_example(given, cache, full=name == "classic") / peak
            found[f"{name}{label}"] = round(share, 4)
            print(f"{name}{label}: {share:.2%} of {peak / 1e12:.0f} TFLOP/s")
    return {"mfu": found}


def peak_of(device: str) -> float:
    """FLOP per second of the device of this name; 0 where it is not known."""
    return next((peak for name, peak in PEAKS.items() if re.search(rf"\b{name}\b", device)), 0.0)


def flops_per_example(given: Recipe, cache: FeatureCache, full: bool) -> float:
    """Of one clip's forward and backward pass, on average over an epoch; `full` in batches padded to 30 s."""
    from transformers import WhisperConfig

    config, settings = (
        WhisperConfig.from_pretrained(whisper_model.resolve(given.model.base).folder),
        given.training,
    )
    rows = cache.split("train")
    frames, labels = cache.rows["frames"].to_numpy()[rows], np.array([len(cache.labels(row)) for row in rows])
    total = 0.0
    for batch in bucketed(frames, settings.batch_size, 1 if full else settings.bucket_batches, settings.seed, 0):
        length = FULL_FRAMES if full else padded_frames(int(frames[batch].max()))
        total += len(batch) * flops(config, length, int(labels[batch].max()))
    return total / len(rows)


def flops(config: Any, n_frames: int, n_tokens: int) -> float:
    """FLOPs to learn from one clip: of its forward pass, and twice that for the backward pass.

    A matrix of m x n takes 2mn at every position that it is applied to, and attention 4 d for every pair of positions
    (Kaplan et al. 2020, section 2.1; with attention: Chowdhery et al. 2022, appendix B). In an encoder-decoder the
    encoder's matrices, and those that make keys and values of its output, apply to its n_frames / 2 positions, the
    decoder's others to its tokens.
    """
    d, positions = config.d_model, n_frames // 2
    stem = 2 * 3 * d * (config.num_mel_bins * n_frames + d * positions)
    encoder_layer = positions * (2 * (4 * d * d + 2 * d * config.encoder_ffn_dim) + 4 * d * positions)
    keys_values = positions * 2 * 2 * d * d
    matrices = 2 * (6 * d * d + 2 * d * config.decoder_ffn_dim)
    decoder_layer = keys_values + n_tokens * (matrices + 4 * d * (n_tokens + positions))
    forward = stem + config.encoder_layers * encoder_layer + config.decoder_layers * decoder_layer
    return 3.0 * (forward + n_tokens * 2 * d * config.vocab_size)


def pairs(folder: Path, sizes: dict[str, int]) -> Path:
    """Each two of the tour's clips joined, 4 s on average, as a folder of recordings with its table."""
    import soundfile

    tour = TourSource(**sizes)
    with open(folder / "transcripts.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "text", "split", "speaker"])
        for split in SPLITS:
            spoken = list(tour.examples((split,)))
            for first, second in zip(spoken[::2], spoken[1::2]):
                samples = np.concatenate([audio.decode(clip.audio).samples for clip in (first, second)])
                soundfile.write(folder / f"{first.id}.wav", samples, audio.SAMPLE_RATE_HZ)
                table.writerow([f"{first.id}.wav", f"{first.text} {second.text}", split, first.speaker])
    return folder


# --- the sides --------------------------------------------------------------------------------------------------------


def classic_here(given: Recipe, cache: FeatureCache, folder: Path) -> Side:
    """The stock Trainer with the stock arguments; of the recipe it takes weights, batch, steps and learning rate."""
    import torch
    import transformers

    base = whisper_model.resolve(given.model.base)
    processor = whisper_model.load_processor(base, given.language)
    transformers.set_seed(given.training.seed)
    model = transformers.WhisperForConditionalGeneration.from_pretrained(base.folder, dtype=torch.float32)
    whisper_model.set_language(model, given.language)
    on_gpu = torch.cuda.is_available()
    steps = given.training.steps
    arguments = transformers.Seq2SeqTrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=given.training.batch_size,
        per_device_eval_batch_size=CLASSIC_EVAL_BATCH,
        learning_rate=given.training.learning_rate,
        warmup_steps=given.training.warmup_steps,
        gradient_checkpointing=True,
        fp16=on_gpu,
        eval_strategy="no",
        save_strategy="no",
        predict_with_generate=True,
        # the prompt of four tokens counts
        generation_max_length=given.evaluation.max_new_tokens + 4,
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
    return Side(clock.rate(given.training.batch_size), seconds, _peak_mb(), [text.strip() for text in texts])


def ours_here(given: Recipe, cache: FeatureCache, folder: Path) -> Side:
    base = whisper_model.resolve(given.model.base)
    clock = _Clock()
    trained = training_loop.train(TrainingRun(given, cache, base, folder / "run", Progress(on_step=clock)))
    rate, ref = clock.rate(given.training.batch_size * given.training.accumulation), whisper_model.resolve(trained.uri)
    model = whisper_model.load(ref, device=environment.detect().device)
    processor = whisper_model.load_processor(ref, given.language)
    full_context = given.training.context == "full"
    look = validation.validator(given, cache, processor, full_context)
    started = time.perf_counter()
    look(model)
    seconds = time.perf_counter() - started
    options = decoding.DecodingOptions(
        given.language,
        given.evaluation.max_new_tokens,
        full_context=full_context,
        batch_frames=given.evaluation.batch_frames,
    )
    transcripts = decoding.decode_rows_to_text(model, processor, cache, cache.split("validation"), options)
    return Side(rate, seconds, _peak_mb(), transcripts)


SIDES = {"classic": classic_here, "ours": ours_here}


class Padded:
    """What `Dataset.map` with the stock extractor leaves: 30 s tensors, and labels without the start token."""

    def __init__(self, cache: FeatureCache, split: str):
        self.cache, self.rows = cache, cache.split(split)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> dict[str, Any]:
        row = int(self.rows[position])
        return {"input_features": self.cache.log_mel(row).padded(), "labels": self.cache.labels(row)}


def collate_padded(clips: list[dict[str, Any]]) -> dict[str, Any]:
    """float32 [B, n_mels, 3000], and labels padded with -100."""
    import torch

    longest = max(len(clip["labels"]) for clip in clips)
    return {
        "input_features": torch.from_numpy(np.stack([clip["input_features"] for clip in clips])),
        "labels": torch.tensor([[*clip["labels"], *[-100] * (longest - len(clip["labels"]))] for clip in clips]),
    }


class _Clock:
    """Notes when each optimizer step ended."""

    def __init__(self):
        self.marks: dict[int, float] = {}

    def __call__(self, step: int) -> None:
        self.marks[step] = time.perf_counter()

    def rate(self, examples: int) -> float:
        """Examples per second after the warm steps, `examples` to a step."""
        first, last = min(WARM_STEPS, max(self.marks) - 1), max(self.marks)
        return (last - first) * examples / (self.marks[last] - self.marks[first])


def _peak_mb() -> float:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {os.cpu_count()} cores"


def _elsewhere(name: str, overrides: dict[str, Any], cache: FeatureCache, folder: Path) -> Side:
    command = [sys.executable, __file__, "--side", name, "--overrides", json.dumps(overrides), "--cache", cache.uri]
    # threads that sleep while they wait, for both: beside any other load a spinning one costs the other its core
    surroundings = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [*command, "--folder", str(folder)], stdout=subprocess.PIPE, env=surroundings, check=True, text=True
    )
    return Side(**json.loads(done.stdout.splitlines()[-1]))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a minute: does it run?")
    parser.add_argument("--model", default="openai/whisper-tiny")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--steps-4s", type=int, default=30, help="steps on the joined clips: speed alone")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--speed-only", action="store_true", help="no word error rates: the weights are not trained")
    parser.add_argument("--folder", type=Path, default=None, help="where to work; default: the temporary folder")
    for hidden in ("--side", "--overrides", "--cache"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.smoke:
        options.steps, options.batch = 4, 4
    return options


if __name__ == "__main__":
    main()
