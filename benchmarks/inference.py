"""Decoding against faster-whisper and the transformers pipeline: same weights, same recordings, in one go.

    python benchmarks/inference.py --model runs/tour/train-…/model       a tuned whisper-tiny, with word error rates
    python benchmarks/inference.py --model openai/whisper-small@q8 --as-tuned --tokens 24 --speed-only --clips 8 \\
        --minutes 0                                                          weights of another size, for speed alone
    python benchmarks/inference.py --sides ours,ours-ctranslate2,ours-transformers --model …   our engines alone
    python benchmarks/inference.py --smoke                               a minute: does it run? its figures mean nothing

ours            Transcriber, windows at the length of the clip, on the engine that `auto` takes: ONNX Runtime, int8, on
                a CPU with VNNI; ours-onnx, ours-ctranslate2 and ours-transformers name one (the last in float32)
faster-whisper  int8, the same exported weights, greedy; a long recording by its batched pipeline (batches of 8)
transformers    its pipeline in float32, greedy; a long recording in chunks of 30 s (batches of 8)

Clips are sentences of the tour's test split and several of one speaker joined, 2 to 10 s; the long recording is all of
them, a pause between each, over and over, until it lasts `--minutes`. Each side runs in a process of its own with
`--threads` threads, loads the model, hears one clip to warm up, then each clip by itself; the sides take turns, round
after round, and the fastest round of each counts. Nobody decodes with beams or with timestamps.

The last line is one JSON object: `speedup_vs_faster_whisper`, `speedup_vs_transformers` (clips), `longform_speedup`
(against faster-whisper), `memory_ratio` (peak of the process, ours over faster-whisper; with the long
recording where there is one), `delta_wer_ci95` (ours less
faster-whisper on the clips, paired, by speaker), `wer` of each side on clips and long recording; null where it was not
measured. `sides` tells seconds and memory of each.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from pipelines.features.sources.synthetic.tour import TourSource
from pipelines.infra import environment
from pipelines.speech import (
    audio,
    scoring,
)
from pipelines.speech.audio import (
    SAMPLE_RATE_HZ,
    Waveform,
)
from pipelines.whisper import export
from pipelines.whisper import model as whisper_model
from pipelines.whisper.model import ModelRef

LANGUAGE = "sv"
PAUSE_S = 0.6
BATCH = 8
Hear = Callable[[np.ndarray], str]


def main() -> None:
    options = _options()
    if options.side:
        return print(json.dumps(_run(options)))
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), options)
    print(json.dumps(result))


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    ref = whisper_model.resolve(options.model)
    clips, texts, speakers = recordings(options.clips)
    long, long_text = joined(clips, texts, options.minutes)
    np.savez(folder / "clips.npz", *clips)
    np.savez(folder / "long.npz", *([long] if options.minutes else []))
    seconds = [len(clip) / SAMPLE_RATE_HZ for clip in clips]
    print(
        f"{ref.title}, {options.threads} threads; {len(clips)} clips of {min(seconds):.1f} to {max(seconds):.1f} s "
        f"({sum(seconds) / len(seconds):.1f} s on average), one recording of {options.minutes:g} minutes",
        flush=True,
    )
    for side in options.sides:  # exports are made before anything is timed
        if side.startswith("ours"):
            SIDES[side](ref, options.threads, options.tokens)
    if "faster-whisper" in options.sides:
        export.export(ref, "int8")
    best: dict[str, dict[str, Any]] = {}
    for number in range(options.rounds):
        for side in options.sides:
            told = _elsewhere(side, folder, options, long=options.minutes > 0 and number == 0)
            known = best.setdefault(side, told)
            for name in ("clips_s", "clips_peak_mb"):
                known[name] = min(known[name], told[name])
            print(
                f"round {number + 1}, {side:15}{told['clips_s'] / len(clips) * 1000:8.0f} ms a clip"
                + (f", {told['long_s']:7.1f} s the long recording" if told["long_s"] else "")
                + f", peak {told['peak_mb']:6,.0f} MB; load {os.getloadavg()[0]:.1f}",
                flush=True,
            )
    return {
        "model": ref.title,
        "speedup_vs_faster_whisper": ratio(best, "faster-whisper", "clips_s"),
        "speedup_vs_transformers": ratio(best, "transformers", "clips_s"),
        "longform_speedup": ratio(best, "faster-whisper", "long_s"),
        "longform_vs_transformers": ratio(best, "transformers", "long_s"),
        "memory_ratio": (turned := ratio(best, "faster-whisper", "peak_mb")) and round(1 / turned, 3),
        "delta_wer_ci95": None,
        **({} if options.speed_only else compared(best, texts, speakers, long_text)),
        "sides": {
            side: {name: round(told[name], 3) for name in ("clips_s", "clips_peak_mb", "long_s", "peak_mb")}
            for side, told in best.items()
        },
    }


def ratio(best: dict[str, dict[str, Any]], peer: str, figure: str) -> float | None:
    """A figure of another side over that of ours; None where one of both was not measured."""
    ours, theirs = (best.get(side, {}).get(figure) for side in ("ours", peer))
    return round(theirs / ours, 2) if ours and theirs else None


def compared(best: dict[str, dict[str, Any]], texts: list[str], speakers: list[str], long_text: str) -> dict[str, Any]:
    """WER of each side on clips and long recording, and ours less faster-whisper on the clips with its interval."""
    found: dict[str, Any] = {"wer": {}, "wer_long": {}}
    for side, told in best.items():
        score = scoring.score(texts, told["texts"], speakers)
        found["wer"][side] = round(score.wer, 4)
        print(f"{side:15} clips {score}")
        if told["long_text"]:
            edits = scoring.count_edits([long_text], [told["long_text"]])
            found["wer_long"][side] = round(float(edits.word_edits.sum() / edits.words.sum()), 4)
            print(f"{side:15} long recording WER {found['wer_long'][side]:.3f}")
    if not {"ours", "faster-whisper"} <= best.keys():
        return found
    ours, peer = (scoring.count_edits(texts, best[side]["texts"]) for side in ("ours", "faster-whisper"))
    difference = scoring.difference(ours, peer, speakers)
    print(f"ours less faster-whisper: {difference}, paired")
    return {**found, "delta_wer_ci95": [round(limit, 4) for limit in difference.ci95]}


def recordings(n: int) -> tuple[list[np.ndarray], list[str], list[str]]:
    """`n` clips of 2 to 10 s, what is said in them, and by whom: one to four test sentences of one speaker."""
    by_speaker: dict[str, list[tuple[np.ndarray, str]]] = {}
    for example in TourSource().examples(("test",)):
        by_speaker.setdefault(example.speaker, []).append((audio.decode(example.audio).samples, example.text))
    clips, texts, speakers = [], [], []
    turn = 0
    while len(clips) < n and any(by_speaker.values()):
        for speaker, left in by_speaker.items():
            take = left[: 1 + turn % 4]
            by_speaker[speaker] = left[1 + turn % 4 :]
            turn += 1
            if take and len(clips) < n:
                samples = np.concatenate([part for sound, _ in take for part in (sound, _silence(0.3))])
                if len(samples) <= 10 * SAMPLE_RATE_HZ:
                    clips.append(samples)
                    texts.append(" ".join(text for _, text in take))
                    speakers.append(speaker)
    return clips, texts, speakers


def joined(clips: list[np.ndarray], texts: list[str], minutes: float) -> tuple[np.ndarray, str]:
    """All clips one after the other, until the recording lasts so long; and what is said in it."""
    parts, said, samples = [], [], 0
    while samples < minutes * 60 * SAMPLE_RATE_HZ:
        for clip, text in zip(clips, texts, strict=True):
            parts += [clip, _silence(PAUSE_S)]
            said.append(text)
            samples += len(clip) + len(parts[-1])
            if samples >= minutes * 60 * SAMPLE_RATE_HZ:
                break
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32), " ".join(said)


def _silence(seconds: float) -> np.ndarray:
    return np.zeros(int(seconds * SAMPLE_RATE_HZ), dtype=np.float32)


# ---- the sides


def _ours(ref: ModelRef, threads: int, tokens: int, engine: str = "auto") -> tuple[Hear, Hear]:
    from pipelines.inference.transcriber import Transcriber

    transcriber = Transcriber(ref, LANGUAGE, engine=engine, threads=threads, max_new_tokens=tokens)
    print(transcriber.loaded.name, file=sys.stderr)

    def hear(samples: np.ndarray) -> str:
        return transcriber.transcribe(Waveform(samples)).text

    return hear, hear


def _faster_whisper(ref: ModelRef, threads: int, tokens: int) -> tuple[Hear, Hear]:
    from faster_whisper import BatchedInferencePipeline, WhisperModel

    model = WhisperModel(str(export.export(ref, "int8")), "cpu", compute_type="int8", cpu_threads=threads)
    batched = BatchedInferencePipeline(model)
    asked = {"language": LANGUAGE, "beam_size": 1, "condition_on_previous_text": False, "without_timestamps": True}
    asked["max_new_tokens"] = tokens
    if ref.context == "clip" and not ref.facts.get("digest"):  # --as-tuned
        asked["temperature"] = 0.0

    def hear(samples: np.ndarray) -> str:
        return " ".join(segment.text.strip() for segment in model.transcribe(samples, **asked)[0])

    def hear_long(samples: np.ndarray) -> str:
        return " ".join(segment.text.strip() for segment in batched.transcribe(samples, batch_size=BATCH, **asked)[0])

    return hear, hear_long


def _transformers(ref: ModelRef, threads: int, tokens: int) -> tuple[Hear, Hear]:
    import torch
    from transformers import pipeline

    torch.set_num_threads(threads)
    asked = {"language": LANGUAGE, "task": "transcribe", "num_beams": 1, "max_new_tokens": tokens}
    transcribe = pipeline("automatic-speech-recognition", model=str(ref.folder))

    def heard(samples: np.ndarray, **how: Any) -> str:
        return transcribe({"raw": samples, "sampling_rate": SAMPLE_RATE_HZ}, generate_kwargs=asked, **how)["text"]

    return heard, lambda samples: heard(samples, chunk_length_s=30, batch_size=BATCH)


SIDES = {
    "ours": _ours,
    "faster-whisper": _faster_whisper,
    "transformers": _transformers,
    **{f"ours-{name}": partial(_ours, engine=name) for name in ("onnx", "ctranslate2", "transformers")},
}


def _run(options: argparse.Namespace) -> dict[str, Any]:
    """One side in this process: seconds over all clips, seconds of the long recording, peak memory, texts."""
    ref = whisper_model.resolve(options.model)
    if options.as_tuned:
        from pipelines.inference import transcriber as inference_transcriber

        ref, inference_transcriber.TEMPERATURES = replace(ref, context="clip"), ()
    hear, hear_long = SIDES[options.side](ref, options.threads, options.tokens)
    clips = list(np.load(options.folder / "clips.npz").values())
    hear(clips[0])
    started = time.perf_counter()
    texts = [hear(clip) for clip in clips]
    clips_s, clips_peak_mb, long_s, long_text = time.perf_counter() - started, _peak_mb(), 0.0, ""
    if options.long:
        (long,) = np.load(options.folder / "long.npz").values()
        started = time.perf_counter()
        long_text = hear_long(long)
        long_s = time.perf_counter() - started
    figures = {"clips_s": clips_s, "clips_peak_mb": clips_peak_mb, "long_s": long_s, "peak_mb": _peak_mb()}
    return {**figures, "texts": texts, "long_text": long_text}


def _peak_mb() -> float:
    """Of this program; what getrusage tells begins with the peak of the process that started it."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    (line,) = (line for line in status.read_text("utf-8").splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def _elsewhere(side: str, folder: Path, options: argparse.Namespace, *, long: bool) -> dict[str, Any]:
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder), "--model", options.model]
    command += ["--threads", str(options.threads), *(["--long"] if long else [])]
    command += ["--tokens", str(options.tokens), *(["--as-tuned"] if options.as_tuned else [])]
    threads = {name: str(options.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    done = subprocess.run(command, env={**os.environ, **threads}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a minute: does it run?")
    parser.add_argument("--model", default="openai/whisper-tiny")
    parser.add_argument("--clips", type=int, default=48)
    parser.add_argument("--minutes", type=float, default=30, help="the long recording; 0 leaves it out")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=224, help="most tokens for a window, on every side")
    parser.add_argument(
        "--as-tuned",
        action="store_true",
        help="decode at clip length although it was not tuned so: for speed, with --tokens, no second tries",
    )
    parser.add_argument("--speed-only", action="store_true", help="no word error rates")
    parser.add_argument(
        "--sides",
        type=lambda text: text.split(","),
        default=["ours", "faster-whisper", "transformers"],
        metavar="SIDE,SIDE",
        help=f"of {', '.join(SIDES)}; default: the first three",
    )
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--long", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.sides) - set(SIDES):
        parser.error(f"--sides takes {', '.join(SIDES)}, got {', '.join(sorted(unknown))}")
    if options.smoke:
        options.clips, options.minutes, options.rounds, options.tokens = 4, 0.5, 1, 12
    return options


if __name__ == "__main__":
    environment.share_cores()
    main()
