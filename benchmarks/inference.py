"""Decoding compared with faster-whisper and the transformers pipeline: same weights, same recordings.

    python benchmarks/inference.py --model runs/tour/train-…/model       a tuned whisper-tiny, with word error rates
    python benchmarks/inference.py --model openai/whisper-small@q8 --as-tuned --tokens 24 --speed-only --clips 8 \\
        --minutes 0                                                      weights of another size, for speed only
    python benchmarks/inference.py --sides ours,ours-ctranslate2,ours-transformers --model …   only our engines
    python benchmarks/inference.py --smoke                a minute, to check that it runs; the figures mean nothing

ours            Transcriber, windows of the clip's length, with the engine that `auto` selects: ONNX Runtime, int8, on
                a CPU with VNNI; ours-onnx, ours-ctranslate2 and ours-transformers (float32) name an engine
faster-whisper  int8, the same exported weights, greedy; a long recording with its batched pipeline (batches of 8)
transformers    its pipeline in float32, greedy; a long recording in chunks of 30 s (batches of 8)

Clips are sentences of the tour's test split, several of one speaker joined, 2 to 10 s; the long recording repeats all
of them with pauses until it lasts `--minutes`. Each side runs in a separate process with `--threads` threads, loads the
model, decodes one clip as warm-up, then each clip alone. The sides take turns, round after round, and the fastest round
of each counts. No side uses beam search or timestamps.

The last line is one JSON object: `speedup_vs_faster_whisper`, `speedup_vs_transformers` (clips), `longform_speedup`
(over faster-whisper), `memory_ratio` (peak of the process, ours over faster-whisper, including the long recording if
there is one), `delta_wer_ci95` (ours minus faster-whisper on the clips, paired, by speaker), `wer` of each side on
clips and long recording; null if not measured. `sides` has seconds and memory of each side.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
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
from benchmarks import side_by_side
from pipelines.features.sources.synthetic.tour import TourSource
from pipelines.infra import environment
from pipelines.speech import audio, scoring
from pipelines.speech.audio import SAMPLE_RATE_HZ, Waveform
from pipelines.whisper import export
from pipelines.whisper import model as whisper_model
from pipelines.whisper.model import ModelRef

LANGUAGE = "sv"
PAUSE_S = 0.6
BATCH = 8
Transcribe = Callable[[np.ndarray], str]


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
    for side in options.sides:  # convert the weights before anything is timed
        if side.startswith("ours"):
            SIDES[side](ref, options.threads, options.tokens)
    if "faster-whisper" in options.sides:
        export.export(ref, "int8")
    best: dict[str, dict[str, Any]] = {}
    for number in range(options.rounds):
        for side in options.sides:
            result = _run_side(side, folder, options, long=options.minutes > 0 and number == 0)
            fastest = best.setdefault(side, result)
            for name in ("clips_s", "clips_peak_mb"):
                fastest[name] = min(fastest[name], result[name])
            print(
                f"round {number + 1}, {side:15}{result['clips_s'] / len(clips) * 1000:8.0f} ms a clip"
                + (f", {result['long_s']:7.1f} s the long recording" if result["long_s"] else "")
                + f", peak {result['peak_mb']:6,.0f} MB; load {os.getloadavg()[0]:.1f}",
                flush=True,
            )
    return {
        "model": ref.title,
        "speedup_vs_faster_whisper": ratio(best, "faster-whisper", "clips_s"),
        "speedup_vs_transformers": ratio(best, "transformers", "clips_s"),
        "longform_speedup": ratio(best, "faster-whisper", "long_s"),
        "longform_vs_transformers": ratio(best, "transformers", "long_s"),
        "memory_ratio": (inverse := ratio(best, "faster-whisper", "peak_mb")) and round(1 / inverse, 3),
        "delta_wer_ci95": None,
        **({} if options.speed_only else compare_wer(best, texts, speakers, long_text)),
        "sides": {
            side: {name: round(result[name], 3) for name in ("clips_s", "clips_peak_mb", "long_s", "peak_mb")}
            for side, result in best.items()
        },
    }


def ratio(best: dict[str, dict[str, Any]], peer: str, figure: str) -> float | None:
    """Return a figure of another side over that of ours; None if one of them was not measured."""
    ours, theirs = (best.get(side, {}).get(figure) for side in ("ours", peer))
    return round(theirs / ours, 2) if ours and theirs else None


def compare_wer(
    best: dict[str, dict[str, Any]], texts: list[str], speakers: list[str], long_text: str
) -> dict[str, Any]:
    """Return WER of each side on clips and long recording, and ours minus faster-whisper on clips with its interval."""
    scores: dict[str, Any] = {"wer": {}, "wer_long": {}}
    for side, result in best.items():
        score = scoring.score(texts, result["texts"], speakers)
        scores["wer"][side] = round(score.wer, 4)
        print(f"{side:15} clips {score}")
        if result["long_text"]:
            edits = scoring.count_edits([long_text], [result["long_text"]])
            scores["wer_long"][side] = round(float(edits.word_edits.sum() / edits.words.sum()), 4)
            print(f"{side:15} long recording WER {scores['wer_long'][side]:.3f}")
    if not {"ours", "faster-whisper"} <= best.keys():
        return scores
    ours, peer = (scoring.count_edits(texts, best[side]["texts"]) for side in ("ours", "faster-whisper"))
    difference = scoring.difference(ours, peer, speakers)
    print(f"ours minus faster-whisper: {difference}, paired")
    return {**scores, "delta_wer_ci95": difference.ci95 and [round(limit, 4) for limit in difference.ci95]}


def recordings(n: int) -> tuple[list[np.ndarray], list[str], list[str]]:
    """Return `n` clips of 2 to 10 s, their texts and their speakers: one to four test sentences of a speaker."""
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
    """Return all clips one after the other, repeated until the recording lasts `minutes`, and its text."""
    parts, references, samples = [], [], 0
    while samples < minutes * 60 * SAMPLE_RATE_HZ:
        for clip, text in zip(clips, texts, strict=True):
            parts += [clip, _silence(PAUSE_S)]
            references.append(text)
            samples += len(clip) + len(parts[-1])
            if samples >= minutes * 60 * SAMPLE_RATE_HZ:
                break
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32), " ".join(references)


def _silence(seconds: float) -> np.ndarray:
    return np.zeros(int(seconds * SAMPLE_RATE_HZ), dtype=np.float32)


# ---- the sides


def _ours(ref: ModelRef, threads: int, tokens: int, engine: str = "auto") -> tuple[Transcribe, Transcribe]:
    from pipelines.inference.transcriber import Transcriber

    transcriber = Transcriber(ref, LANGUAGE, engine=engine, threads=threads, max_new_tokens=tokens)
    print(transcriber.loaded.name, file=sys.stderr)

    def transcribe(samples: np.ndarray) -> str:
        return transcriber.transcribe(Waveform(samples)).text

    return transcribe, transcribe


def _faster_whisper(ref: ModelRef, threads: int, tokens: int) -> tuple[Transcribe, Transcribe]:
    from faster_whisper import BatchedInferencePipeline, WhisperModel

    model = WhisperModel(str(export.export(ref, "int8")), "cpu", compute_type="int8", cpu_threads=threads)
    batched = BatchedInferencePipeline(model)
    options = {"language": LANGUAGE, "beam_size": 1, "condition_on_previous_text": False, "without_timestamps": True}
    options["max_new_tokens"] = tokens
    if ref.context == "clip" and not ref.facts.get("digest"):  # --as-tuned
        options["temperature"] = 0.0

    def transcribe(samples: np.ndarray) -> str:
        return " ".join(segment.text.strip() for segment in model.transcribe(samples, **options)[0])

    def transcribe_long(samples: np.ndarray) -> str:
        return " ".join(segment.text.strip() for segment in batched.transcribe(samples, batch_size=BATCH, **options)[0])

    return transcribe, transcribe_long


def _transformers(ref: ModelRef, threads: int, tokens: int) -> tuple[Transcribe, Transcribe]:
    import torch
    from transformers import pipeline

    torch.set_num_threads(threads)
    options = {"language": LANGUAGE, "task": "transcribe", "num_beams": 1, "max_new_tokens": tokens}
    recognizer = pipeline("automatic-speech-recognition", model=str(ref.folder))

    def transcribe(samples: np.ndarray, **chunking: Any) -> str:
        audio_input = {"raw": samples, "sampling_rate": SAMPLE_RATE_HZ}
        return recognizer(audio_input, generate_kwargs=options, **chunking)["text"]

    return transcribe, lambda samples: transcribe(samples, chunk_length_s=30, batch_size=BATCH)


SIDES = {
    "ours": _ours,
    "faster-whisper": _faster_whisper,
    "transformers": _transformers,
    **{f"ours-{name}": partial(_ours, engine=name) for name in ("onnx", "ctranslate2", "transformers")},
}


def _run(options: argparse.Namespace) -> dict[str, Any]:
    """Run one side in this process: seconds of all clips and of the long recording, peak memory, texts."""
    ref = whisper_model.resolve(options.model)
    if options.as_tuned:
        from pipelines.inference import transcriber as inference_transcriber

        ref, inference_transcriber.TEMPERATURES = replace(ref, context="clip"), ()
    transcribe, transcribe_long = SIDES[options.side](ref, options.threads, options.tokens)
    clips = list(np.load(options.folder / "clips.npz").values())
    transcribe(clips[0])
    started = time.perf_counter()
    texts = [transcribe(clip) for clip in clips]
    clips_s, clips_peak_mb, long_s, long_text = time.perf_counter() - started, _peak_mb(), 0.0, ""
    if options.long:
        (long,) = np.load(options.folder / "long.npz").values()
        started = time.perf_counter()
        long_text = transcribe_long(long)
        long_s = time.perf_counter() - started
    figures = {"clips_s": clips_s, "clips_peak_mb": clips_peak_mb, "long_s": long_s, "peak_mb": _peak_mb()}
    return {**figures, "texts": texts, "long_text": long_text}


def _peak_mb() -> float:
    """Return the peak memory of this process. On Linux, getrusage would include the peak of its parent."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    (line,) = (line for line in status.read_text("utf-8").splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def _run_side(side: str, folder: Path, options: argparse.Namespace, *, long: bool) -> dict[str, Any]:
    arguments = ["--side", side, "--folder", str(folder), "--model", options.model]
    arguments += ["--threads", str(options.threads), *(["--long"] if long else [])]
    arguments += ["--tokens", str(options.tokens), *(["--as-tuned"] if options.as_tuned else [])]
    variables = {name: str(options.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return side_by_side.run_in_process(__file__, arguments, variables)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a minute, to check that it runs")
    parser.add_argument("--model", default="openai/whisper-tiny")
    parser.add_argument("--clips", type=int, default=48)
    parser.add_argument("--minutes", type=float, default=30, help="the long recording; 0 leaves it out")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=224, help="limit of tokens for a window, on every side")
    parser.add_argument(
        "--as-tuned",
        action="store_true",
        help="decode at clip length although the model was not tuned so, without fallback; for speed, with --tokens",
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
