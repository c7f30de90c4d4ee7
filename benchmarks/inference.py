"""Decoding compared with faster-whisper, transformers' pipeline and whisper.cpp: same weights, same recordings.

    python benchmarks/inference.py --model runs/tour/train-…/model       a tuned whisper-tiny
    python benchmarks/inference.py --minutes 8 --minutes 30 --model …    with long recordings of 8 and of 30 minutes
    python benchmarks/inference.py --sides ours,ours-ctranslate2,ours-transformers --model …   only our engines
    python benchmarks/inference.py --smoke                a minute, to check that it runs; the figures mean nothing

ours                     Transcriber as `transcribe` uses it, with the options that it chooses for the model
ours-beam1, ours-beam5   the same with this number of beams; ours-onnx, ours-ctranslate2, ours-transformers: by engine
faster-whisper           as shipped: beam 5, timestamps, fallback; int8
faster-whisper-greedy    the same with beam 1
faster-whisper-batched   its BatchedInferencePipeline with its defaults, int8; long recordings only
transformers             its pipeline with its defaults, float32; long recordings, which these refuse, in chunks of 30 s
transformers-timestamps  the same with return_timestamps=True, which needs no chunks
whisper.cpp              pywhispercpp with its defaults, float16

A side whose package is missing, or that cannot read the model, is left out and named. All arguments of all sides are
printed first (sides.py).

Clips are sentences of the tour's test split, several of one speaker joined, 2 to 10 s. With `--voices 112` more
speakers say test sentences of the planted corpus, except those that the tour trains or validates on. A long recording
repeats all of them with pauses until it lasts `--minutes`. Each side runs in a separate process with `--threads`
threads, loads the model, decodes one clip as warm-up, then each clip alone. The sides take turns, round after round,
and the fastest round of each counts. Long recordings are decoded in the first round.

Differences in WER are ours minus the other side, paired, with 95 % intervals over speakers. In a long recording the
transcript is aligned with the whole text, and each edit belongs to the clip in whose words it lies (an insertion to the
clip of the word before it).

The last line is one JSON object. `sides` has for each side its `arguments`, `peak_mb` of its process, and for `clips`
and each long recording (by its minutes) `s`, `cpu_s` (processor time), `wer`, `ci95`, `minus` (ours minus this side:
`delta`, `ci95`) and `speedup` (its time over ours). Also: `speedup_vs_faster_whisper` and `speedup_vs_transformers`
(clips), `longform_speedup` (over the batched pipeline, longest recording), `memory_ratio` (peak, ours over
faster-whisper), `delta_wer_ci95` (ours minus faster-whisper, clips), `wer` of each side on clips; null if not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import side_by_side
from benchmarks.recordings import TEST_VOICES, Clip, aligned_edits, joined, test_clips
from benchmarks.sides import DEFAULT, SIDES, Request
from pipelines.infra import environment
from pipelines.infra.errors import LabError
from pipelines.speech import scoring
from pipelines.speech.audio import SAMPLE_RATE_HZ
from pipelines.speech.edits import Edits
from pipelines.whisper import model as whisper_model

CLIPS = "clips"


@dataclass
class Result:
    """What a side did, by name of the recording: CLIPS, or the minutes of a long one."""

    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    """Of all threads: on a busy machine it says more than `seconds`."""
    texts: dict[str, list[str]] = field(default_factory=dict)
    peak_mb: float = 0.0


@dataclass(frozen=True)
class Material:
    """Recordings by name, and for each the clips whose texts are spoken in it."""

    samples: dict[str, list[np.ndarray]]
    clips: dict[str, list[Clip]]

    @classmethod
    def of(cls, n_clips: int, voices: int, minutes: list[float]) -> Material:
        clips = test_clips(n_clips, voices)
        long = {f"{length:g}": joined(clips, length) for length in minutes}
        return cls(
            {CLIPS: [clip.samples for clip in clips], **{name: [samples] for name, (samples, _) in long.items()}},
            {CLIPS: clips, **{name: used for name, (_, used) in long.items()}},
        )

    def edits(self, name: str, texts: list[str]) -> Edits:
        """Return the edits of each clip."""
        references = [clip.text for clip in self.clips[name]]
        return scoring.count_edits(references, texts) if name == CLIPS else aligned_edits(references, *texts)

    def speakers(self, name: str) -> list[str]:
        return [clip.speaker for clip in self.clips[name]]


def main() -> None:
    options = _options()
    if options.side:
        return print(json.dumps(asdict(_run(options))))
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = measure(Path(folder), options)
        except LabError as error:
            sys.exit(str(error))
    print(json.dumps(result, ensure_ascii=False))


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    material, request = Material.of(options.clips, options.voices, options.minutes), _request(options)
    for name, samples in material.samples.items():
        np.savez(folder / f"{name}.npz", *samples)
    seconds = [len(samples) / SAMPLE_RATE_HZ for samples in material.samples[CLIPS]]
    lengths = f"; recordings of {', '.join(list(material.samples)[1:])} minutes" if options.minutes else ""
    print(
        f"{request.ref.title}, {options.threads} threads; {len(seconds)} clips of {min(seconds):.1f} to "
        f"{max(seconds):.1f} s ({sum(seconds) / len(seconds):.1f} s on average){lengths}"
    )
    sides = [side for side in options.sides if _prepare(side, request)]
    arguments = {side: SIDES[side].arguments(request) for side in sides}
    load, best = os.getloadavg()[0], {side: Result() for side in sides}
    for number in range(options.rounds):
        for side in sides:
            names = [CLIPS] if SIDES[side].clips is not None else []
            names += list(material.samples)[1:] if number == 0 else []
            if names:
                _keep_fastest(best[side], _run_side(side, names, folder, options))
                print(f"round {number + 1}, {_timing(side, best[side], len(seconds))}", flush=True)
    scores = {} if options.speed_only else {side: score(best, side, material) for side in sides}
    return {
        "model": request.ref.title,
        "date": date.today().isoformat(),
        "threads": options.threads,
        "load": [round(load, 2), round(os.getloadavg()[0], 2)],
        **_summary(best, scores),
        "sides": {
            side: {
                "arguments": arguments[side],
                "peak_mb": round(best[side].peak_mb),
                **{
                    name: {
                        "s": round(taken, 3),
                        "cpu_s": round(best[side].cpu_seconds[name], 3),
                        "speedup": _ratio(best, side, name),
                        **scores.get(side, {}).get(name, {}),
                    }
                    for name, taken in best[side].seconds.items()
                },
            }
            for side in sides
        },
    }


def score(best: dict[str, Result], side: str, material: Material) -> dict[str, dict[str, Any]]:
    """Return WER and the difference of ours to it, by name of the recording; print both."""
    scores: dict[str, dict[str, Any]] = {}
    for name, texts in best[side].texts.items():
        edits, speakers = material.edits(name, texts), material.speakers(name)
        of_side = scoring.score_edits(edits, speakers)
        scores[name] = {"wer": round(of_side.wer, 4), "ci95": _rounded(of_side.ci95)}
        line = f"{side:24}{_label(name):11} WER {of_side.wer:.3f} (95 % {of_side.units.interval(of_side.ci95)})"
        if side != "ours" and name in best.get("ours", Result()).texts:
            difference = scoring.difference(material.edits(name, best["ours"].texts[name]), edits, speakers)
            scores[name]["minus"] = {"delta": round(difference.delta, 4), "ci95": _rounded(difference.ci95)}
            line += f"; ours minus this: {difference}"
        print(line, flush=True)
    return scores


def _summary(best: dict[str, Result], scores: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the figures that the module's docstring names; None for those that were not measured."""
    longest = max((name for result in best.values() for name in result.seconds if name != CLIPS), key=float, default="")
    shipped = scores.get("faster-whisper", {}).get(CLIPS, {})
    peaks = [best[side].peak_mb for side in ("ours", "faster-whisper") if side in best]
    return {
        "speedup_vs_faster_whisper": _ratio(best, "faster-whisper", CLIPS),
        "speedup_vs_transformers": _ratio(best, "transformers", CLIPS),
        "longform_speedup": _ratio(best, "faster-whisper-batched", longest),
        "memory_ratio": round(peaks[0] / peaks[1], 3) if len(peaks) == 2 else None,
        "delta_wer_ci95": shipped.get("minus", {}).get("ci95"),
        "wer": {side: of_side[CLIPS]["wer"] for side, of_side in scores.items() if CLIPS in of_side},
    }


def _ratio(best: dict[str, Result], side: str, name: str) -> float | None:
    """Return the time of a side over that of ours; None if one of them was not measured."""
    ours, theirs = (best[one].seconds.get(name) if one in best else None for one in ("ours", side))
    return round(theirs / ours, 2) if ours and theirs else None


def _rounded(interval: tuple[float, float] | None) -> list[float] | None:
    return interval and [round(limit, 4) for limit in interval]


def _label(name: str) -> str:
    return name if name == CLIPS else f"{name} minutes"


def _timing(side: str, result: Result, n_clips: int) -> str:
    parts = [
        f"{taken / n_clips * 1000:.0f} ms ({result.cpu_seconds[name] / n_clips * 1000:.0f} of processor time) a clip"
        if name == CLIPS
        else f"{taken:.1f} s ({result.cpu_seconds[name]:.1f} of processor time) for {_label(name)}"
        for name, taken in result.seconds.items()
    ]
    return f"{side:24}{', '.join(parts)}; peak {result.peak_mb:,.0f} MB; load {os.getloadavg()[0]:.1f}"


# ---- running the sides


def _prepare(side: str, request: Request) -> bool:
    """Print the arguments of a side and convert the weights for it; False, with the reason, if it cannot run."""
    if missing := SIDES[side].missing:
        print(f"{side} is left out. To measure it, run: pip install '{missing}'", flush=True)
        return False
    try:
        SIDES[side].prepare(request)
    except LabError as error:
        print(f"{side} is left out: {error}", flush=True)
        return False
    print(f"{side}: {json.dumps(SIDES[side].arguments(request))}", flush=True)
    return True


def _request(options: argparse.Namespace) -> Request:
    return Request(whisper_model.resolve(options.model), options.threads, options.tokens, options.as_tuned)


def _run(options: argparse.Namespace) -> Result:
    """Run one side in this process on the recordings in `options.names`."""
    side, request = SIDES[options.side], _request(options)
    transcribe, arguments, result = side.load(request), side.arguments(request), Result()
    (first, *_) = np.load(options.folder / f"{CLIPS}.npz").values()
    transcribe(first, arguments["clips" if side.clips is not None else "recordings"])
    for name in options.names:
        call, recordings = arguments[CLIPS if name == CLIPS else "recordings"], np.load(options.folder / f"{name}.npz")
        samples = list(recordings.values())
        started, cpu_started = time.perf_counter(), time.process_time()
        result.texts[name] = [transcribe(one, call) for one in samples]
        result.seconds[name] = time.perf_counter() - started
        result.cpu_seconds[name] = time.process_time() - cpu_started
    result.peak_mb = _peak_mb()
    return result


def _keep_fastest(best: Result, result: Result) -> None:
    """Add what was measured in another round: the lower times, the first transcripts, the higher peak."""
    for name, taken in result.seconds.items():
        best.seconds[name] = min(taken, best.seconds.get(name, taken))
        cpu_taken = result.cpu_seconds[name]
        best.cpu_seconds[name] = min(cpu_taken, best.cpu_seconds.get(name, cpu_taken))
        best.texts.setdefault(name, result.texts[name])
    best.peak_mb = max(best.peak_mb, result.peak_mb)


def _peak_mb() -> float:
    """Return the peak memory of this process. On Linux, getrusage would include the peak of its parent."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    (line,) = (line for line in status.read_text("utf-8").splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def _run_side(side: str, names: list[str], folder: Path, options: argparse.Namespace) -> Result:
    arguments = ["--side", side, "--folder", str(folder), "--model", options.model, "--names", *names]
    arguments += ["--threads", str(options.threads), "--tokens", str(options.tokens)]
    arguments += ["--as-tuned"] if options.as_tuned else []
    variables = {name: str(options.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return Result(**side_by_side.run_in_process(__file__, arguments, variables))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a minute, to check that it runs")
    parser.add_argument("--model", default="openai/whisper-tiny")
    parser.add_argument("--clips", type=int, default=48, help="at most this number of clips")
    parser.add_argument(
        "--voices", type=int, default=TEST_VOICES, help="speakers, a multiple of 4: 112 for narrow intervals"
    )
    parser.add_argument(
        "--minutes", type=float, action="append", metavar="N", help="a long recording of N minutes; may be repeated"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--tokens", type=int, default=0, help="limit of tokens for a window, on every side; default: each side's own"
    )
    parser.add_argument(
        "--as-tuned",
        action="store_true",
        help="decode at clip length on our side and without fallback everywhere; for speed alone, with --tokens",
    )
    parser.add_argument("--speed-only", action="store_true", help="no word error rates")
    parser.add_argument(
        "--sides",
        type=lambda text: text.split(","),
        default=DEFAULT,
        metavar="SIDE,SIDE",
        help=f"of {', '.join(SIDES)}; default: all but ours-…",
    )
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--names", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.sides) - set(SIDES):
        parser.error(f"--sides takes {', '.join(SIDES)}, got {', '.join(sorted(unknown))}")
    options.minutes = sorted({length for length in options.minutes or [] if length > 0})
    if min(options.clips, options.rounds, options.threads) < 1:
        parser.error("--clips, --rounds and --threads take at least 1")
    if options.smoke:
        options.clips, options.minutes, options.rounds, options.tokens = 4, [0.5], 1, 12
    return options


if __name__ == "__main__":
    environment.share_cores()
    main()
