"""How much of a long recording becomes clips when its subtitles are shifted, drift, and are partly wrong or missing.

    python benchmarks/alignment.py [--model openai/whisper-tiny] [--minutes 60] [--text break] [--smoke]

Sentences of the tour's test split, which no model tuned on the tour has seen, are joined with pauses, noise and music.
None is repeated: a long recording takes more sentences of the same voices. The aligner's limits were chosen on other
sentences. Subtitles come 2 s late, drift by 1 %, one line of ten is paraphrased (a word is left out or exchanged) and
one of twenty is missing. `--text` gives another text of the same recording: see TEXTS. An untuned model adapts to the
recording first. Progress is printed to standard error. The last line is one JSON object:

recovered       share of the speech with a right line that is in clips with the very text that is spoken there
of_all          the same as a share of all speech
unusable        share of all speech whose line is missing or paraphrased: no clip can be right there
wrong           share of the clips whose text is not what is spoken there
start_s, end_s  median distance of a clip's ends from the sound of its sentences
real_time       time for decoding, adapting and aligning, as a multiple of the recording's length
cpu_real_time   CPU time of all threads, the same; on a busy machine it says more
peak_mb         highest resident memory of the process, and `start_mb` that before it aligned
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import sounds
from pipelines.features.sources import PartExample
from pipelines.features.sources.aligned.source import AlignedSource
from pipelines.features.sources.synthetic import espeak, tour, tour_text
from pipelines.features.sources.synthetic.tour import TourSource
from pipelines.infra import environment, progress_file
from pipelines.speech import audio
from pipelines.speech.audio import SAMPLE_RATE_HZ
from pipelines.whisper import model as whisper_model

PAUSES_S = (0.3, 0.4, 0.5, 0.6, 0.8, 1.2)
MUSIC_SHARE, MUSIC_S = 0.03, (3.0, 12.0)
"""Share of the pauses that hold music, and its length."""
NOISE_RMS = 0.003
SHIFT_S, DRIFT = 2.0, 1.01
PARAPHRASED, MISSING = 0.10, 0.05
TEXTS = {
    "subtitles": "as above",
    "break": "subtitles that come 20 s later after two thirds of the sentences, as if a break was cut out",
    "late": "a manuscript without the sentences of the first minute",
    "manuscript": "a manuscript without a tenth of the sentences, those after the middle",
}
BREAK_S, LATE_S = 20.0, 60.0
TOLERANCE_S = 0.25
"""A sentence belongs to a clip that holds more of it than this at either end."""


@dataclass(frozen=True)
class Sentence:
    """A sentence of the recording, where its sound is, and its line in the subtitles: empty if it is missing."""

    start_s: float
    end_s: float
    text: str
    line: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="openai/whisper-tiny")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--min-logprob", type=float, default=AlignedSource.min_logprob)
    parser.add_argument("--adapt-steps", type=int, default=AlignedSource.adapt_steps, help="0: none")
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--text", choices=TEXTS, default="subtitles", help="; ".join(map(": ".join, TEXTS.items())))
    parser.add_argument("--seed", type=int, default=3, help="of the order, pauses, noise and faults")
    parser.add_argument("--smoke", action="store_true", help="one minute")
    options = parser.parse_args()
    environment.share_cores()
    os.environ.setdefault(progress_file.VARIABLE, "/dev/stderr")
    ref = whisper_model.resolve(options.model)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LAB_CACHE"] = f"{folder}/cache"  # nothing of an earlier run is reused
        minutes = 1.0 if options.smoke else options.minutes
        with ProcessPoolExecutor(1) as child:  # its memory is not the aligner's
            written = child.submit(write_recording, Path(folder), minutes, options.split, options.seed, options.text)
            sentences, seconds = written.result()
        start, start_cpu, start_mb = time.perf_counter(), time.process_time(), peak_mb()
        source = AlignedSource(folder, str(ref.folder), options.min_logprob, adapt_steps=options.adapt_steps)
        examples = list(source.examples())
        real_time = (time.perf_counter() - start) / seconds
        cpu_real_time = (time.process_time() - start_cpu) / seconds
    parts = [one for one in examples if isinstance(one, PartExample)]
    clips = [(one.excerpt.start_s, one.excerpt.end_s, one.text) for one in parts]
    result = {
        "model": ref.title,
        "text": options.text,
        "minutes": round(seconds / 60, 2),
        "sentences": len(sentences),
        **score(sentences, clips),
        "rejected": dict(Counter(one.audio.reason for one in examples if not isinstance(one, PartExample))),
        "real_time": round(real_time, 2),
        "cpu_real_time": round(cpu_real_time, 2),
        "start_mb": start_mb,
        "peak_mb": peak_mb(),
        "load": round(os.getloadavg()[0], 1),
        "cores": os.cpu_count(),
    }
    print(json.dumps(result, ensure_ascii=False))


def write_recording(
    folder: Path, minutes: float, split: str, seed: int, text: str = "subtitles"
) -> tuple[list[Sentence], float]:
    """Write `recording.flac` and its text to a folder; return what is spoken, and the length in seconds."""
    rng = random.Random(seed)
    vocabulary = sorted({word for one in TourSource().plan() if one.split == "test" for word in one.text.split()})
    return write_joined(folder / "recording", _sentences(split, rng), vocabulary, rng, seed, minutes, text)


def write_joined(
    stem: Path,
    sentences: Iterator[tuple[np.ndarray, str]],
    vocabulary: Sequence[str],
    rng: random.Random,
    seed: int,
    minutes: float = math.inf,
    text: str = "subtitles",
) -> tuple[list[Sentence], float]:
    """Join sentences (samples and text) to a recording of at most `minutes` with a text: `stem`.flac and .srt or .txt.

    Return what is spoken, and the length in seconds. `vocabulary`: words of paraphrases. `seed`: of the noise. `text`:
    one of TEXTS.
    """
    import soundfile

    noise_rng = np.random.default_rng(seed)
    parts: list[np.ndarray] = []
    recorded: list[Sentence] = []
    n_samples = 0
    for sound, sentence in sentences:
        audible = np.flatnonzero(np.abs(sound) > 0.02 * np.abs(sound).max())
        start_s, end_s = ((n_samples + at) / SAMPLE_RATE_HZ for at in (audible[0], audible[-1]))
        recorded.append(Sentence(start_s, end_s, sentence, _line(sentence, rng, vocabulary)))
        more = [sound, _silence(rng.choice(PAUSES_S))]
        if rng.random() < MUSIC_SHARE:
            more += [_music(rng, noise_rng), _silence(0.5)]
        parts += more
        n_samples += sum(map(len, more))
        if n_samples >= minutes * 60 * SAMPLE_RATE_HZ:
            break
    noise = sounds._noise(noise_rng, n_samples, 1.0)
    samples = np.concatenate(parts) + noise * (NOISE_RMS / noise.std())
    soundfile.write(stem.with_suffix(".flac"), samples.clip(-1, 1), SAMPLE_RATE_HZ)
    recorded = _with_text(stem, recorded, text)
    return recorded, n_samples / SAMPLE_RATE_HZ


def peak_mb() -> int:
    """Return the highest resident memory of this process so far."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def score(sentences: list[Sentence], clips: list[tuple[float, float, str]]) -> dict[str, float]:
    """Compare clips (start and end in seconds, text) with what is spoken there."""
    all_s = sum(one.end_s - one.start_s for one in sentences)
    usable_s = sum(one.end_s - one.start_s for one in sentences if one.line == one.text)
    recovered_s, n_wrong = 0.0, 0
    starts_s, ends_s = [], []
    for start_s, end_s, text in clips:
        inside = sentences_in(sentences, start_s, end_s)
        if text != " ".join(one.text for one in inside):
            n_wrong += 1
            continue
        recovered_s += sum(one.end_s - one.start_s for one in inside)
        starts_s.append(abs(start_s - inside[0].start_s))
        ends_s.append(abs(end_s - inside[-1].end_s))
    return {
        "clips": len(clips),
        "recovered": round(recovered_s / usable_s, 3) if usable_s else 0.0,
        "of_all": round(recovered_s / all_s, 3),
        "unusable": round(1 - usable_s / all_s, 3),
        "wrong": round(n_wrong / len(clips), 3) if clips else 0.0,
        "start_s": round(float(np.median(starts_s)), 3) if starts_s else None,
        "end_s": round(float(np.median(ends_s)), 3) if ends_s else None,
    }


def sentences_in(sentences: list[Sentence], start_s: float, end_s: float) -> list[Sentence]:
    """Return the sentences that a clip holds."""
    return [one for one in sentences if one.end_s > start_s + TOLERANCE_S and one.start_s < end_s - TOLERANCE_S]


def _sentences(split: str, rng: random.Random) -> Iterator[tuple[np.ndarray, str]]:
    """Yield the sound and text of the sentences of a split, then of others that are in no split, by the same voices."""
    plan = TourSource().plan()
    used = sum(utterance.origin == "grammar" for utterance in plan)
    others = tour_text.grammar_sentences(tour_text.grammar_size(), TourSource.seed)[used:]
    half = others[: len(others) // 2] if split == "test" else others[len(others) // 2 :]
    voices = tour.personas(split, TourSource.seed, tour.PERSONAS[split])
    in_split = [utterance for utterance in plan if utterance.split == split]
    more = [*tour.turns("alignment", split, [(text, "grammar") for text in half], voices, TourSource.seed)]
    for utterances in (in_split, more):
        rng.shuffle(utterances)
        for one in utterances:
            sound = espeak.synthesise(one.text, one.variant, one.rate_wpm, one.pitch)
            yield audio.decode(sound).samples, one.text


def _line(text: str, rng: random.Random, vocabulary: list[str]) -> str:
    """Return the subtitle of a sentence: as spoken, a paraphrase, or empty."""
    draw = rng.random()
    if draw < MISSING:
        return ""
    if draw >= MISSING + PARAPHRASED:
        return text
    words = text.split()
    n = rng.randrange(len(words))
    others = [word for word in vocabulary if word != words[n]]
    words[n : n + 1] = [] if len(words) > 3 and rng.random() < 0.5 else [rng.choice(others)]
    return " ".join(words)


def _with_text(stem: Path, sentences: list[Sentence], text: str) -> list[Sentence]:
    """Write the text of a recording; return the sentences without the lines that it lacks."""
    n, is_manuscript = len(sentences), text in ("late", "manuscript")
    if text == "late":
        late_s = min(LATE_S, sentences[-1].end_s / 2)
        sentences = [replace(one, line="") if one.start_s < late_s else one for one in sentences]
    elif text == "manuscript":
        skipped = range(n // 2, n // 2 + n // 10)
        sentences = [replace(one, line="") if i in skipped else one for i, one in enumerate(sentences)]
    if is_manuscript:
        stem.with_suffix(".txt").write_text("\n\n".join(one.line for one in sentences if one.line), "utf-8")
    else:
        break_from_s = sentences[n * 2 // 3].start_s if text == "break" else math.inf
        stem.with_suffix(".srt").write_text("\n".join(_cues(sentences, break_from_s)), "utf-8")
    return sentences


def _cues(sentences: list[Sentence], break_from_s: float) -> Iterator[str]:
    for number, one in enumerate((one for one in sentences if one.line), start=1):
        shift_s = SHIFT_S + (BREAK_S if one.start_s >= break_from_s else 0.0)
        start, end = (_stamp(DRIFT * at_s + shift_s) for at_s in (one.start_s, one.end_s))
        yield f"{number}\n{start} --> {end}\n{one.line}\n"


def _stamp(at_s: float) -> str:
    ms = round(1000 * at_s)
    return f"{ms // 3_600_000:02d}:{ms // 60_000 % 60:02d}:{ms // 1000 % 60:02d},{ms % 1000:03d}"


def _music(rng: random.Random, noise_rng: np.random.Generator) -> np.ndarray:
    play = rng.choice((sounds._chords, sounds._melody, sounds._strings, sounds._drums))
    return sounds.at_peak(play(noise_rng, int(rng.uniform(*MUSIC_S) * SAMPLE_RATE_HZ)), -10)


def _silence(seconds: float) -> np.ndarray:
    return np.zeros(int(seconds * SAMPLE_RATE_HZ), dtype=np.float32)


if __name__ == "__main__":
    main()
