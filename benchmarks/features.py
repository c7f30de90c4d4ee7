"""The feature pipeline against the classic recipe and against the floor, on real mp3 at 48 kHz, both sides in one go.

    python benchmarks/features.py            a quarter of an hour on two quiet cores, 4 GB of disk for a while
    python benchmarks/features.py --smoke    20 seconds: does it run? its figures mean nothing

classic   `datasets.Dataset.map`, the stock extractor, padded float32, `save_to_disk`; the better of 1 and 2 processes
ours      the same files through the lab's gate into a verified cache, float32 and float16, starting workers included
floor     decode, resample, log-mel and nothing else, in as many processes; starting them included

Sides take turns, so that whatever else the machine does falls on all of them; ratios are medians over the rounds.
The last line is one JSON object: `speedup` (ours in float32 over classic), `floor_fraction`, `bytes_ratio_f32` and
`bytes_ratio_f16` (ours over classic), `reads_per_s`, and of a large build over a small one `rss_growth` (peak memory)
and `rate_growth` (clips per second).

The classic side gets one compute thread to a process, which is the kindest to it: with the libraries' defaults one
process made 47 clips/s and two made 24, where it made 34 and 63 so (two cores, idle). The floor was 282 there: where
cores are slow, decoding is what both sides wait for, and whatever decodes is at most 4.5 times as fast as that classic.

What a 4 s clip costs (one thread of a 2-core machine, load 1 to 2, best of five), and what was tried to lower it:

decode      1.40 ms   from bytes, a path or a memfd alike; averaging one channel cost 0.21 ms more and is left out now
resample    0.47 ms   soxr HQ, kept. MQ 0.47; LQ 0.40, and the log-mel moves by up to 0.95; a kept stream object 0.57
log-mel     0.86 ms   by the stock extractor; 0.67 by the same operations without its wrapping, bit for bit: kept.
                      0.50 from squared real and imaginary parts, 5 % of the values one bit off; 0.63 by numpy's FFT,
                      3e-5 off: neither is kept
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import itertools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from pipelines.features import (
    build,
    cache,
)
from pipelines.features.curation.clip_filter import ClipFilter
from pipelines.features.sources import Example
from pipelines.features.sources.synthetic.tour import TourSource
from pipelines.infra.parallel import process_pool
from pipelines.speech import audio
from pipelines.whisper import (
    log_mel,
    tokens,
)
from pipelines.whisper import model as whisper_model

SENTENCES = 480
MP3_RATE_HZ = 48_000
IDENTITY = {"features.n_mels": 80, "features.dtype": "float32", "source.kind": "benchmark"}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    clips: int = 12_000
    """Of the order of a Common Voice release: starting the workers counts, and takes seconds."""
    classic_clips: int = 400
    rounds: int = 3
    reads: int = 50_000
    small: int = 1_000
    large: int = 100_000
    classic_processes: tuple[int, ...] = (1, 2)
    """The better of these counts."""


SMOKE = Sizes(64, classic_clips=16, rounds=1, reads=500, small=256, large=512, classic_processes=(1,))


def corpus(folder: Path, sentences: int = SENTENCES) -> list[Example]:
    """mp3 files of two tour sentences each, 4 s on average, and their transcripts."""
    import soundfile
    import soxr

    spoken = list(itertools.islice(TourSource().examples(("train",)), sentences))
    examples = []
    for number, (first, second) in enumerate(zip(spoken[::2], spoken[1::2])):
        samples = np.concatenate([audio.decode(part.audio).samples for part in (first, second)])
        path = folder / f"{number:05d}.mp3"
        soundfile.write(path, soxr.resample(samples, audio.SAMPLE_RATE_HZ, MP3_RATE_HZ), MP3_RATE_HZ, format="MP3")
        examples.append(Example(str(number), "train", f"{first.text} {second.text}", path, first.speaker))
    return examples


def repeated(examples: list[Example], n: int) -> Iterator[Example]:
    """`n` examples, each with an id of its own; the files come round again."""
    return (dataclasses.replace(examples[i % len(examples)], id=str(i)) for i in range(n))


def _processor() -> Any:
    return whisper_model.load_processor(whisper_model.resolve("openai/whisper-tiny"), "sv")


def clip_filter(processor: Any) -> ClipFilter:
    return ClipFilter(tokens.labeller(processor, "sv"), 80, 0.1, 30.0, 1e-3)


# --- the sides: each returns clips per second, and those that write, bytes per clip ----------------------------------


def classic(examples: list[Example], folder: Path, processes: int) -> tuple[float, float]:
    """The recipe of the courses in a fresh interpreter: its forks hang where the parent has used torch before.

    One torch thread to a process, which on a busy machine is kinder to it than its default.
    """
    rows = [[str(example.audio), example.text] for example in examples]
    (folder / "rows.json").write_text(json.dumps(rows))
    return tuple(_elsewhere("classic", len(rows), processes, folder))


def classic_here(processes: int, folder: Path) -> tuple[float, float]:
    """Every clip a padded float32 tensor in an Arrow table."""
    import datasets
    import soundfile
    import soxr

    datasets.disable_progress_bars()
    processor = _processor()
    extractor, tokenizer = processor.feature_extractor, processor.tokenizer

    def prepare(row: dict[str, Any]) -> dict[str, Any]:
        samples, rate_hz = soundfile.read(row["audio"], dtype="float32")
        samples = soxr.resample(samples, rate_hz, audio.SAMPLE_RATE_HZ)
        made = extractor(samples, sampling_rate=audio.SAMPLE_RATE_HZ)
        return {"input_features": made.input_features[0], "labels": tokenizer(row["sentence"]).input_ids}

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
    made = build.build(
        folder / "cache",
        repeated(examples, n),
        clip_filter(processor).create_clip,
        IDENTITY | {"features.dtype": dtype},
        build.BuildOptions(workers=processes),
    )
    return n / (time.perf_counter() - started), made.bytes / n


def floor(examples: list[Example], n: int, processes: int) -> float:
    """Blocks of the size of a shard, so that both sides hand out work alike; one process needs no worker."""
    from concurrent.futures import ThreadPoolExecutor

    paths = [example.audio for example in repeated(examples, n)]
    blocks = [paths[at : at + 256] for at in range(0, n, 256)]
    started = time.perf_counter()
    with ThreadPoolExecutor(processes) as threads, process_pool.Pool(processes, hear) as pool:
        answer = (lambda block: pool.ask(block, "a block")) if processes > 1 else hear
        list(threads.map(answer, blocks))
        return n / (time.perf_counter() - started)


def hear(paths: list[Path]) -> int:
    """Decode, resample, log-mel: what nobody who makes features can do without."""
    return sum(len(log_mel.extract(audio.decode(path)).frames) for path in paths)


def reads(folder: Path, n: int) -> float:
    """Clips per second, frames copied out of the page cache in random order."""
    opened = cache.open_cache(folder)
    rows = np.random.default_rng(0).integers(0, len(opened.rows), n).tolist()
    warm = sum(float(opened.log_mel(row).frames[0, 0]) for row in range(len(opened.rows)))
    started = time.perf_counter()
    total = sum(float(np.array(opened.log_mel(row).frames)[0, 0]) for row in rows)
    assert np.isfinite(warm + total)
    return n / (time.perf_counter() - started)


# --- scale: a process of its own for each size, since peak memory never falls ----------------------------------------


def scaled(n: int, processes: int, folder: Path) -> dict[str, float]:
    """`rate` (clips per second without the start), `peak_mb` (this process and its largest worker), `open_s`."""
    return _elsewhere("scaled", n, processes, folder)


def _elsewhere(what: str, n: int, processes: int, folder: Path) -> Any:
    """What `<what>_here` returns in a process of its own."""
    command = [sys.executable, __file__, "--here", what, "--clips", str(n), "--workers", str(processes)]
    environment = os.environ | process_pool.ONE_THREAD
    done = subprocess.run([*command, "--folder", str(folder)], stdout=subprocess.PIPE, env=environment, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def scaled_here(n: int, processes: int, folder: Path) -> dict[str, float]:
    marks: list[tuple[float, int]] = []
    build.build(
        folder / "scaled",
        tones(n),
        ClipFilter(letters, 80, 0.1, 30.0, 1e-3).create_clip,
        IDENTITY | {"features.dtype": "float16"},
        build.BuildOptions(shard_clips=64, workers=processes),
        on_clips=lambda clips: marks.append((time.perf_counter(), clips)),
    )
    peak_kb = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    started = time.perf_counter()
    cache.open_cache(folder / "scaled")
    opened_s = time.perf_counter() - started
    # every worker has started once as many shards are done as there are workers; they end in pairs
    (warm_s, _), rest = marks[processes - 1], marks[processes:]
    rate = sum(clips for _, clips in rest) / (rest[-1][0] - warm_s)
    return {"rate": rate, "peak_mb": peak_kb / 1024, "open_s": opened_s}


def tones(n: int) -> Iterator[Example]:
    """Synthetic clips of 1 s, 16 kHz, all different."""
    import soundfile

    t = np.arange(audio.SAMPLE_RATE_HZ) / audio.SAMPLE_RATE_HZ
    voices = [0.3 * np.sin(2 * np.pi * (100 + 7 * i) * t) for i in range(32)]
    for i in range(n):
        file = io.BytesIO()
        voice = voices[i % 32].copy()
        voice[i % len(voice)] = 0.5
        soundfile.write(file, voice, audio.SAMPLE_RATE_HZ, format="WAV", subtype="PCM_16")
        yield Example(
            f"tone-{i:07d}", "train", f"ton nummer {i} av {n}, tydligt uttalad", file.getvalue(), f"s{i % 99}"
        )


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


# --- all together -----------------------------------------------------------------------------------------------------


def main() -> None:
    options = _options()
    if options.here == "scaled":
        return print(json.dumps(scaled_here(options.clips, options.workers, options.folder)))
    if options.here == "classic":
        return print(json.dumps(classic_here(options.workers, options.folder)))
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
        rounds.append(_round(examples, processor, folder, sizes, processes))
        told = ", ".join(f"{name} {value:,.0f}" for name, value in rounds[-1].items())
        print(f"round {number}: {told}; load {os.getloadavg()[0]:.1f}", flush=True)
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


def _round(examples: list[Example], processor: Any, folder: Path, sizes: Sizes, processes: int) -> dict[str, float]:
    """Every side once, on a clean folder."""
    found = {}
    for n in sizes.classic_processes:
        few = list(repeated(examples, sizes.classic_clips))
        found[f"classic {n}"], found["classic bytes"] = _clean(folder, classic, few, processes=n)
    found["floor"] = floor(examples, sizes.clips, processes)
    for dtype in ("float32", "float16"):
        found[dtype], found[f"{dtype} bytes"] = _clean(
            folder, ours, examples, sizes.clips, processor, dtype=dtype, processes=processes
        )
    return found


def _best_classic(found: dict[str, float]) -> float:
    return max(value for name, value in found.items() if name in ("classic 1", "classic 2"))


def _clean(folder: Path, side: Any, *arguments: Any, **more: Any) -> tuple[float, float]:
    with tempfile.TemporaryDirectory(dir=folder) as work:
        return side(*arguments, folder=Path(work), **more)


def _scale(n: int, processes: int, folder: Path) -> dict[str, float]:
    found = scaled(n, processes, folder)
    shutil.rmtree(folder / "scaled")
    print(
        f"{n:>8,} clips of 1 s: {found['rate']:,.0f} clips/s, peak {found['peak_mb']:,.0f} MB, opened in "
        f"{found['open_s']:.2f} s"
    )
    return found


def _median(rounds: list[dict[str, float]], ratio: Any) -> float:
    return round(statistics.median(map(ratio, rounds)), 4)


def _table(rounds: list[dict[str, float]]) -> None:
    middle = {name: statistics.median(found[name] for found in rounds) for name in rounds[0]}
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
    parser.add_argument("--smoke", action="store_true", help="20 seconds: does it run?")
    parser.add_argument("--clips", type=int, default=Sizes.clips, help="clips of a round of ours and of the floor")
    parser.add_argument("--classic-clips", type=int, default=Sizes.classic_clips)
    parser.add_argument("--rounds", type=int, default=Sizes.rounds)
    parser.add_argument("--large", type=int, default=Sizes.large, help="clips of the large build")
    parser.add_argument("--workers", type=int, default=0, help="0: every core, or one for --smoke")
    parser.add_argument("--folder", type=Path, default=None, help="where to work; default: the temporary folder")
    parser.add_argument("--here", choices=("scaled", "classic"), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    from benchmarks import features as importable  # workers find what they run by its module

    importable.main()
