"""The feature pipeline compared with the classic recipe and with a floor, on mp3 at 48 kHz.

    python benchmarks/features.py            a quarter of an hour on two quiet cores, 4 GB of disk for a while
    python benchmarks/features.py --smoke    20 seconds, to check that it runs; the figures mean nothing

classic   `datasets.Dataset.map`, the stock extractor, padded float32, `save_to_disk`; the better of 1 and 2 processes
ours      the same files into a verified cache, float32 and float16, including the start of worker processes
floor     only decode, resample and log-mel, in as many processes, including their start

Sides take turns, so that other load affects all of them; ratios are medians over the rounds. The last line is one JSON
object: `speedup` (ours in float32 over classic), `floor_fraction`, `bytes_ratio_f32` and `bytes_ratio_f16` (ours over
classic), `reads_per_s`, and, for a large build over a small one, `rss_growth` (peak memory) and `rate_growth` (clips
per second).

The classic side gets one compute thread per process, which is best for it: with the libraries' defaults one process
processed 47 clips/s and two processes 24, instead of 34 and 63 (two idle cores). The floor was 282 clips/s there: on
slow cores decoding limits all sides, and no pipeline that decodes can be more than 4.5 times as fast as that classic.

Time for a 4 s clip (one thread of a 2-core machine, load 1 to 2, best of five), and attempts to reduce it:

decode      1.40 ms   the same from bytes, a path or a memfd; averaging one channel took 0.21 ms and is now skipped
resample    0.47 ms   soxr HQ. MQ 0.47; LQ 0.40, but the log-mel changes by up to 0.95; a reused stream object 0.57
log-mel     0.86 ms   stock extractor; 0.67 with the same operations without its wrapper, bit for bit equal: used.
                      0.50 from squared real and imaginary parts (5 % of the values differ by one bit) and 0.63 with
                      numpy's FFT (3e-5 off) are not used
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import recordings, side_by_side
from pipelines.features import build, cache
from pipelines.features.curation.clip_filter import ClipFilter
from pipelines.features.sources import Example
from pipelines.features.sources.synthetic.tour import TourSource
from pipelines.infra.parallel import process_pool
from pipelines.speech import audio
from pipelines.whisper import log_mel, tokens
from pipelines.whisper import model as whisper_model

SENTENCES = 480
MP3_RATE_HZ = 48_000
IDENTITY = {"features.n_mels": 80, "features.dtype": "float32", "source.kind": "benchmark"}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the measurements."""

    clips: int = 12_000
    """Enough that the start of worker processes, which takes seconds, has little effect."""
    classic_clips: int = 400
    rounds: int = 3
    reads: int = 50_000
    small: int = 1_000
    large: int = 100_000
    classic_processes: tuple[int, ...] = (1, 2)
    """The better of these counts."""


SMOKE = Sizes(64, classic_clips=16, rounds=1, reads=500, small=256, large=512, classic_processes=(1,))


def corpus(folder: Path, sentences: int = SENTENCES) -> list[Example]:
    """Write mp3 files of two tour sentences each, 4 s on average; return them with their transcripts."""
    import soundfile
    import soxr

    tour, examples = itertools.islice(TourSource().examples(("train",)), sentences), []
    for number, (first, samples, text) in enumerate(recordings.joined_pairs(tour)):
        path = folder / f"{number:05d}.mp3"
        soundfile.write(path, soxr.resample(samples, audio.SAMPLE_RATE_HZ, MP3_RATE_HZ), MP3_RATE_HZ, format="MP3")
        examples.append(Example(str(number), "train", text, path, first.speaker))
    return examples


def repeated(examples: list[Example], n: int) -> Iterator[Example]:
    """Return `n` examples with different ids; files are repeated."""
    return (dataclasses.replace(examples[i % len(examples)], id=str(i)) for i in range(n))


def _processor() -> Any:
    return whisper_model.load_processor(whisper_model.resolve("openai/whisper-tiny"), "sv")


def clip_filter(processor: Any) -> ClipFilter:
    return ClipFilter(tokens.labeller(processor, "sv"), 80, 0.1, 30.0, 1e-3)


# --- the sides: each returns clips per second, and those that write, bytes per clip ----------------------------------


def classic(examples: list[Example], folder: Path, processes: int) -> tuple[float, float]:
    """Run the recipe of the courses in a new process: its forks hang if the parent has used torch.

    It has one torch thread per process, which is faster than the default on a busy machine.
    """
    rows = [[str(example.audio), example.text] for example in examples]
    (folder / "rows.json").write_text(json.dumps(rows))
    return tuple(_run_part("classic", len(rows), processes, folder))


def run_classic(processes: int, folder: Path) -> tuple[float, float]:
    """Write every clip as a padded float32 tensor to an Arrow table."""
    import datasets
    import soundfile
    import soxr

    datasets.disable_progress_bars()
    processor = _processor()
    extractor, tokenizer = processor.feature_extractor, processor.tokenizer

    def prepare(row: dict[str, Any]) -> dict[str, Any]:
        samples, rate_hz = soundfile.read(row["audio"], dtype="float32")
        samples = soxr.resample(samples, rate_hz, audio.SAMPLE_RATE_HZ)
        features = extractor(samples, sampling_rate=audio.SAMPLE_RATE_HZ)
        return {"input_features": features.input_features[0], "labels": tokenizer(row["sentence"]).input_ids}

    paths, texts = zip(*json.loads((folder / "rows.json").read_text()))
    columns = {"audio": list(paths), "sentence": list(texts)}
    started = time.perf_counter()
    rows = datasets.Dataset.from_dict(columns)
    rows = rows.map(
        prepare,
        remove_columns=rows.column_names,
        num_proc=processes if processes > 1 else None,
        load_from_cache_file=False,
        cache_file_name=str(folder / "map.arrow"),
    )
    rows.save_to_disk(folder / "saved")
    seconds = time.perf_counter() - started
    written = sum(path.stat().st_size for path in (folder / "saved").rglob("*") if path.is_file())
    return len(paths) / seconds, written / len(paths)


def ours(
    examples: list[Example], n: int, processor: Any, folder: Path, dtype: str, processes: int
) -> tuple[float, float]:
    started = time.perf_counter()
    built = build.build(
        folder / "cache",
        repeated(examples, n),
        clip_filter(processor).create_clip,
        IDENTITY | {"features.dtype": dtype},
        build.BuildOptions(workers=processes),
    )
    return n / (time.perf_counter() - started), built.bytes / n


def floor(examples: list[Example], n: int, processes: int) -> float:
    """Return clips per second of decoding, resampling and log-mel only, in blocks of a shard's size."""
    from concurrent.futures import ThreadPoolExecutor

    paths = [example.audio for example in repeated(examples, n)]
    blocks = [paths[at : at + 256] for at in range(0, n, 256)]
    started = time.perf_counter()
    with ThreadPoolExecutor(processes) as threads, process_pool.Pool(processes, extract) as pool:
        answer = (lambda block: pool.run(block, "a block")) if processes > 1 else extract
        list(threads.map(answer, blocks))
        return n / (time.perf_counter() - started)


def extract(paths: list[Path]) -> int:
    """Decode, resample and compute the log-mel; return the number of frames."""
    return sum(len(log_mel.extract(audio.decode(path)).frames) for path in paths)


def reads(folder: Path, n: int) -> float:
    """Return clips per second when frames are read in random order from the page cache."""
    opened = cache.open_cache(folder)
    rows = np.random.default_rng(0).integers(0, len(opened.rows), n).tolist()
    checksum = sum(float(opened.log_mel(row).frames[0, 0]) for row in range(len(opened.rows)))
    started = time.perf_counter()
    total = sum(float(np.array(opened.log_mel(row).frames)[0, 0]) for row in rows)
    assert np.isfinite(checksum + total)
    return n / (time.perf_counter() - started)


# --- scale: a separate process for each size, since peak memory never falls ------------------------------------------


def scaled(n: int, processes: int, folder: Path) -> dict[str, float]:
    """Return `rate` (clips per second after start-up), `peak_mb` (main process and largest worker) and `open_s`."""
    return _run_part("scaled", n, processes, folder)


def _run_part(name: str, n: int, processes: int, folder: Path) -> Any:
    """Run `run_<name>` in a separate process and return its result."""
    arguments = ["--part", name, "--clips", str(n), "--workers", str(processes), "--folder", str(folder)]
    return side_by_side.run_in_process(__file__, arguments, process_pool.ONE_THREAD)


def run_scaled(n: int, processes: int, folder: Path) -> dict[str, float]:
    marks: list[tuple[float, int]] = []
    build.build(
        folder / "scaled",
        recordings.tones(n),
        ClipFilter(letters, 80, 0.1, 30.0, 1e-3).create_clip,
        IDENTITY | {"features.dtype": "float16"},
        build.BuildOptions(shard_clips=64, workers=processes),
        on_clips=lambda clips: marks.append((time.perf_counter(), clips)),
    )
    peak_kb = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    started = time.perf_counter()
    cache.open_cache(folder / "scaled")
    opened_s = time.perf_counter() - started
    # all workers have started when as many shards are finished as there are workers
    (started_s, _), rest = marks[processes - 1], marks[processes:]
    rate = sum(clips for _, clips in rest) / (rest[-1][0] - started_s)
    return {"rate": rate, "peak_mb": peak_kb / 1024, "open_s": opened_s}


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


# --- all together -----------------------------------------------------------------------------------------------------


def main() -> None:
    options = _options()
    if options.part == "scaled":
        return print(json.dumps(run_scaled(options.clips, options.workers, options.folder)))
    if options.part == "classic":
        return print(json.dumps(run_classic(options.workers, options.folder)))
    sizes = SMOKE if options.smoke else Sizes(options.clips, options.classic_clips, options.rounds, large=options.large)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = measure(Path(folder), sizes, options.workers or (1 if options.smoke else process_pool.cores()))
    print(json.dumps(result))


def measure(folder: Path, sizes: Sizes, processes: int) -> dict[str, float]:
    (folder / "mp3").mkdir()
    examples = corpus(folder / "mp3", 32 if sizes == SMOKE else SENTENCES)
    processor = _processor()
    print(
        f"{len(examples)} mp3 files, {processes} workers, load {os.getloadavg()[0]:.1f} of {process_pool.cores()} cores"
    )
    rounds = []
    for number in range(1, sizes.rounds + 1):
        rounds.append(_run_round(examples, processor, folder, sizes, processes))
        figures = ", ".join(f"{name} {value:,.0f}" for name, value in rounds[-1].items())
        print(f"round {number}: {figures}; load {os.getloadavg()[0]:.1f}", flush=True)
    _table(rounds)
    ours(examples, min(sizes.clips, 2_000), processor, folder, "float32", processes)
    reads_per_s = reads(folder / "cache", sizes.reads)
    shutil.rmtree(folder / "cache")
    small, large = (_scale(n, processes, folder) for n in (sizes.small, sizes.large))
    return {
        "speedup": _median(rounds, lambda r: r["float32"] / _best_classic(r)),
        "floor_fraction": _median(rounds, lambda r: r["float32"] / r["floor"]),
        "bytes_ratio_f32": _median(rounds, lambda r: r["float32 bytes"] / r["classic bytes"]),
        "bytes_ratio_f16": _median(rounds, lambda r: r["float16 bytes"] / r["classic bytes"]),
        "reads_per_s": round(reads_per_s),
        "rss_growth": round(large["peak_mb"] / small["peak_mb"], 3),
        "rate_growth": round(large["rate"] / small["rate"], 3),
    }


def _run_round(examples: list[Example], processor: Any, folder: Path, sizes: Sizes, processes: int) -> dict[str, float]:
    """Run every side once, each in an empty folder."""
    rates = {}
    for n in sizes.classic_processes:
        few = list(repeated(examples, sizes.classic_clips))
        rates[f"classic {n}"], rates["classic bytes"] = _clean(folder, classic, few, processes=n)
    rates["floor"] = floor(examples, sizes.clips, processes)
    for dtype in ("float32", "float16"):
        rates[dtype], rates[f"{dtype} bytes"] = _clean(
            folder, ours, examples, sizes.clips, processor, dtype=dtype, processes=processes
        )
    return rates


def _best_classic(rates: dict[str, float]) -> float:
    return max(value for name, value in rates.items() if name in ("classic 1", "classic 2"))


def _clean(folder: Path, side: Any, *arguments: Any, **more: Any) -> tuple[float, float]:
    with tempfile.TemporaryDirectory(dir=folder) as work:
        return side(*arguments, folder=Path(work), **more)


def _scale(n: int, processes: int, folder: Path) -> dict[str, float]:
    result = scaled(n, processes, folder)
    shutil.rmtree(folder / "scaled")
    print(
        f"{n:>8,} clips of 1 s: {result['rate']:,.0f} clips/s, peak {result['peak_mb']:,.0f} MB, opened in "
        f"{result['open_s']:.2f} s"
    )
    return result


def _median(rounds: list[dict[str, float]], ratio: Any) -> float:
    return round(statistics.median(map(ratio, rounds)), 4)


def _table(rounds: list[dict[str, float]]) -> None:
    middle = {name: statistics.median(rates[name] for rates in rounds) for name in rounds[0]}
    print(f"{'':22}{'clips/s':>9}{'kB/clip':>9}")
    for label, rate, size in (
        *((f"classic, {n} process(es)", f"classic {n}", "classic bytes") for n in (1, 2) if f"classic {n}" in middle),
        ("ours, float32", "float32", "float32 bytes"),
        ("ours, float16", "float16", "float16 bytes"),
        ("floor, nothing written", "floor", ""),
    ):
        print(f"{label:22}{middle[rate]:9,.0f}{middle[size] / 1e3 if size else 0:9,.0f}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="20 seconds, to check that it runs")
    parser.add_argument("--clips", type=int, default=Sizes.clips, help="clips of a round of ours and of the floor")
    parser.add_argument("--classic-clips", type=int, default=Sizes.classic_clips)
    parser.add_argument("--rounds", type=int, default=Sizes.rounds)
    parser.add_argument("--large", type=int, default=Sizes.large, help="clips of the large build")
    parser.add_argument("--workers", type=int, default=0, help="0: every core, or one for --smoke")
    parser.add_argument("--folder", type=Path, default=None, help="working folder; default: the temporary folder")
    parser.add_argument("--part", choices=("scaled", "classic"), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    from benchmarks import features as importable  # workers import the functions that they run

    importable.main()
