"""The corpus `planted`: the tour's speech with known faults planted in its training split.

Real corpora have such faults, but unlabelled: wrong transcripts, noise, clipping, copies, clips of the test's speakers
and sentences, mostly men. Here the fault of each clip is recorded, so that the results of curation can be measured. The
truth is in two columns that no curation step reads: `planted` (one of FAULTS, or empty) and `spoken` (the true
transcript). Validation and test are clean and do not depend on the faults.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.features.sources import SPLITS, Example, lines_sha256
from pipelines.features.sources.synthetic import espeak, tour
from pipelines.features.sources.synthetic.tour import Persona, SpokenExample, Utterance
from pipelines.infra.errors import LabError
from pipelines.speech import text

FAULTS = (
    "label_swap",
    "label_word",
    "noise",
    "clipping",
    "duplicate",
    "leak_speaker",
    "leak_sentence",
    "leak_audio",
    "leak_renamed",
)
"""Values of the column `planted`.

label_swap      the transcript is another clip's
label_word      one word of the transcript was dropped, doubled or exchanged
noise           white or pink noise, from 5 dB above the speech to 5 dB below it
clipping        a quarter of the samples at full scale
duplicate       a copy of another clip (the first of each group counts as clean)
leak_speaker    spoken by a speaker of the test split
leak_sentence   a sentence of the test split, without its capital letter and full stop
leak_audio      a clip of the test split under another speaker's name, one word of the transcript dropped
leak_renamed    spoken by a speaker of the test split under another name: no metadata shows it
"""
PERSONAS = {"train": 8, "validation": 4}
"""Speakers per variant: 48 and 8 speakers."""
TEST_VOICES = 32
NOISE_SNR_DB = (-5.0, 5.0)
CLIPPED_SHARE = 0.25
COPIES = 3
"""Copies of a duplicated clip."""
SENTENCE_WORDS = range(3, 13)
"""Number of words of a sentence from a file, for clips of the tour's length."""


@dataclass(frozen=True)
class FaultRates:
    """Fractions of the training clips with each fault, 0 to 1; no clip has two. Meanings: FAULTS."""

    label_swap: float = 0.0
    label_word: float = 0.0
    noise: float = 0.0
    clipping: float = 0.0
    duplicate: float = 0.0
    leak: float = 0.0
    """All four kinds of leak together, a quarter each."""

    def kinds(self, n_clips: int, rng: random.Random) -> list[str]:
        """Return the fault, or "", of each of `n_clips` clips, in random order."""
        rates = {fault: self.leak / 4 if fault.startswith("leak") else getattr(self, fault) for fault in FAULTS}
        kinds = [fault for fault, rate in rates.items() for _ in range(round(rate * n_clips))]
        if len(kinds) > n_clips:
            raise LabError(f"source.faults must be at most 1 in all, got {sum(rates.values()):g}: plant less")
        kinds += [""] * (n_clips - len(kinds))
        rng.shuffle(kinds)
        return kinds


@dataclass(frozen=True)
class Line:
    """One clip of the plan: the utterance, and its metadata in the corpus.

    The plan's digest contains these field names.
    """

    said: Utterance
    transcript: str
    speaker: str
    fault: str = ""


@dataclass(frozen=True)
class PlantedSource:
    """The planted corpus with this many clips per split."""

    train: int = 1_200
    validation: int = 120
    test: int = 224
    seed: int = 7
    faults: FaultRates = field(default_factory=FaultRates)
    men: float = 0.5
    """Fraction of the training clips with male voices."""
    sentences: str = ""
    """Path of a text file whose lines replace the tour's sentences in the training split."""
    test_voices: int = TEST_VOICES
    """Number of speakers in the test split, as many of each variant. With more than TEST_VOICES each sentence is spoken
    by several, so that more clips need no more sentences, and training keeps its own."""

    def identity(self) -> dict[str, str]:
        """Return sizes and seed, a digest of the plan, and the build of espeak-ng."""
        return {
            "kind": "planted",
            **{name: str(getattr(self, name)) for name in (*SPLITS, "seed")},
            "plan_sha256": lines_sha256(map(repr, self.plan())),
            "espeak": espeak.version(),
            "espeak_build_sha256": espeak.build_sha256(),
        }

    def plan(self) -> tuple[Line, ...]:
        """Return every clip in the corpus's order, without audio: a pure function of the settings."""
        return self._lines

    def examples(self, splits: tuple[str, ...] = SPLITS) -> Iterator[Example]:
        """Yield the examples of these splits in the plan's order. Their audio is synthesised on access."""
        return (
            SpokenExample(audio=partial(_audio, line), **_fields(line))
            for line in self.plan()
            if line.said.split in splits
        )

    def outline(self) -> Iterator[Example]:
        """Yield all examples without audio: nothing is synthesised."""
        return (Example(audio=b"", **_fields(line)) for line in self.plan())

    @cached_property
    def _lines(self) -> tuple[Line, ...]:
        n_sentences = -(-self.test * TEST_VOICES // max(self.test_voices, TEST_VOICES))
        sizes = {"train": self.train, "validation": self.validation, "test": n_sentences}
        texts = tour.split_texts(sizes, self.seed)
        if self.sentences:
            held_out = [sentence for split in ("validation", "test") for sentence, _ in texts[split]]
            texts["train"] = _read_sentences(Path(self.sentences), self.train, held_out, self.seed)
        per_variant = {**PERSONAS, "test": self.test_voices // len(tour.SPLIT_VARIANTS["test"])}
        voices = {split: tour.personas(split, self.seed, per_variant[split]) for split in SPLITS}
        in_turn = tour.in_turn(voices["test"], n_sentences, self.test)
        mixed = {**voices, "train": self._by_gender(voices["train"]), "test": in_turn}
        texts["test"] = [*itertools.islice(itertools.cycle(texts["test"]), self.test)]
        spoken = {split: tour.turns("planted", split, texts[split], mixed[split], self.seed) for split in SPLITS}
        clean = {split: [*map(_clean_line, utterances)] for split, utterances in spoken.items()}
        clean["train"] = _Planter(clean, voices["test"], self.faults, self.seed).lines()
        return tuple(line for split in SPLITS for line in clean[split])

    def _by_gender(self, voices: list[Persona]) -> list[Persona]:
        """Return one speaker per training clip: men and women in the set ratio, each taking turns in their group."""
        rng, n_men = random.Random(f"planted men {self.seed}"), round(self.men * self.train)
        men = [True] * n_men + [False] * (self.train - n_men)
        rng.shuffle(men)
        groups = {man: [voice for voice in voices if (voice.variant[3] == "m") == man] for man in (True, False)}
        n_used = {True: 0, False: 0}
        speakers = []
        for man in men:
            speakers.append(groups[man][n_used[man] % len(groups[man])])
            n_used[man] += 1
        return speakers


class _Planter:
    """Plants faults in clean training lines."""

    def __init__(self, clean: dict[str, list[Line]], test_voices: list[Persona], faults: FaultRates, seed: int):
        self.rng = random.Random(f"planted faults {seed}")
        self.train, self.test = clean["train"], clean["test"]
        speakers = {line.speaker for line in self.test}  # a small test split has fewer than all
        self.voices = [voice for voice in test_voices if voice.speaker in speakers]
        self.kinds = faults.kinds(len(self.train), self.rng)
        self.words = sorted({word for line in self.train for word in line.transcript.rstrip(".?!").split()[1:]})

    def lines(self) -> list[Line]:
        lines = list(self.train)
        self._swap(lines)
        self._copy(lines)
        planters: dict[str, Callable[[Line], Line]] = {
            "label_word": self._with_another_word,
            "noise": lambda line: line,
            "clipping": lambda line: line,
            "leak_speaker": self._by_a_test_speaker,
            "leak_sentence": self._of_a_test_sentence,
            "leak_audio": self._of_a_test_clip,
            "leak_renamed": self._by_a_renamed_test_speaker,
        }
        for index, kind in enumerate(self.kinds):
            if kind in planters:
                lines[index] = replace(planters[kind](lines[index]), fault=kind)
        return lines

    def _indices(self, kind: str) -> list[int]:
        return [index for index, other in enumerate(self.kinds) if other == kind]

    def _swap(self, lines: list[Line]) -> None:
        """Give each chosen clip the transcript of the next one."""
        indices = self._indices("label_swap")
        if len(indices) == 1:
            raise LabError("source.faults.label_swap must take two clips or none, got one: plant more")
        for index, other in zip(indices, [*indices[1:], *indices[:1]], strict=True):
            lines[index] = replace(lines[index], transcript=self.train[other].transcript, fault="label_swap")

    def _copy(self, lines: list[Line]) -> None:
        """Form groups of one clean clip and COPIES copies; the first in the corpus's order is the original."""
        copies, originals = self._indices("duplicate"), self._indices("")
        self.rng.shuffle(copies)
        self.rng.shuffle(originals)
        for start in range(0, len(copies), COPIES):
            if not originals:
                raise LabError("source.faults.duplicate must leave clips that can be copied: plant fewer faults")
            first, *others = sorted([originals.pop(), *copies[start : start + COPIES]])
            for index in others:
                utterance = replace(lines[first].said, id=lines[index].said.id)
                lines[index] = replace(lines[first], said=utterance, fault="duplicate")

    def _with_another_word(self, line: Line) -> Line:
        return replace(line, transcript=self._changed(line.transcript))

    def _changed(self, transcript: str) -> str:
        """Drop, double or exchange one word, not the first."""
        words = transcript.split()
        index = self.rng.randrange(1, len(words)) if len(words) > 1 else 0
        word = words[index].rstrip(".?!,")
        sign = words[index][len(word) :]
        other = self.rng.choice([candidate for candidate in self.words if candidate != word])
        drop = [] if len(words) > 1 else [other]
        words[index : index + 1] = self.rng.choice([drop, [word, word + sign], [other + sign]])
        return " ".join(words)

    def _by_a_test_speaker(self, line: Line) -> Line:
        voice = self.rng.choice(self.voices)
        utterance = replace(
            line.said, speaker=voice.speaker, variant=voice.variant, rate_wpm=voice.rate_wpm, pitch=voice.pitch
        )
        return replace(line, said=utterance, speaker=voice.speaker)

    def _by_a_renamed_test_speaker(self, line: Line) -> Line:
        leak = self._by_a_test_speaker(line)
        return replace(leak, speaker=f"unknown-{leak.speaker}")

    def _of_a_test_sentence(self, line: Line) -> Line:
        sentence = self.rng.choice(self.test).transcript
        transcript = sentence[0].lower() + sentence[1:].rstrip(".")
        return replace(line, said=replace(line.said, text=sentence), transcript=transcript)

    def _of_a_test_clip(self, line: Line) -> Line:
        copied = self.rng.choice(self.test)
        utterance = replace(copied.said, id=line.said.id, split="train")
        words = copied.transcript.split()
        transcript = " ".join(words[:-1]) if len(words) > 1 else self._changed(copied.transcript)
        return replace(line, said=utterance, transcript=transcript)


def add_noise(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add white or pink noise to float [n], at a signal-to-noise ratio drawn from NOISE_SNR_DB."""
    noise = rng.standard_normal(len(samples))
    if rng.random() < 0.5:  # pink: power falls with frequency
        spectrum = np.fft.rfft(noise)
        noise = np.fft.irfft(spectrum / np.sqrt(np.maximum(np.arange(len(spectrum)), 1)), len(samples))
    snr_db = rng.uniform(*NOISE_SNR_DB)
    noise_power = np.square(samples).mean() / 10 ** (snr_db / 10)
    mixed = samples + noise * np.sqrt(noise_power / np.square(noise).mean())
    return mixed * min(1.0, 0.95 / np.abs(mixed).max())  # avoid clipping


def clip(samples: np.ndarray) -> np.ndarray:
    """Amplify float [n] until CLIPPED_SHARE of the samples that are not silence reach full scale."""
    loud = np.abs(samples)[np.abs(samples) > 0.01 * np.abs(samples).max()]
    return np.clip(samples / np.quantile(loud, 1 - CLIPPED_SHARE), -1.0, 1.0)


def _read_sentences(path: Path, count: int, held_out: list[str], seed: int) -> list[tuple[str, str]]:
    """Draw `count` lines of a text file that are not held out. Returns (text, origin) pairs."""
    try:
        lines = [line.strip() for line in path.expanduser().read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise LabError(f"source.sentences must name a UTF-8 text file, got {path} ({type(error).__name__})") from None
    used, chosen = {text.normalise(sentence) for sentence in held_out}, []
    random.Random(f"planted sentences {seed}").shuffle(lines)
    for line in lines:
        normal = text.normalise(line)
        if len(normal.split()) in SENTENCE_WORDS and normal not in used:
            used.add(normal)
            chosen.append((line, "file"))
    if len(chosen) < count:
        raise LabError(
            f"source.sentences must hold {count:,} different lines of {SENTENCE_WORDS[0]} to {SENTENCE_WORDS[-1]} "
            f"words, {path} holds {len(chosen):,}: lower source.train"
        )
    return chosen[:count]


def _clean_line(utterance: Utterance) -> Line:
    return Line(utterance, utterance.text, utterance.speaker)


def _audio(line: Line) -> bytes:
    utterance = line.said
    wav = espeak.synthesise(utterance.text, utterance.variant, utterance.rate_wpm, utterance.pitch)
    if line.fault == "noise":
        digest = hashlib.sha256(f"planted noise {utterance}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
        return _transform(wav, lambda samples: add_noise(samples, rng))
    return _transform(wav, clip) if line.fault == "clipping" else wav


def _transform(wav: bytes, transform: Callable[[np.ndarray], np.ndarray]) -> bytes:
    """Apply `transform` to the samples of a WAV file."""
    import soundfile

    samples, rate_hz = soundfile.read(io.BytesIO(wav), dtype="float64")
    file = io.BytesIO()
    soundfile.write(file, transform(samples), rate_hz, format="WAV", subtype="PCM_16")
    return file.getvalue()


def _fields(line: Line) -> dict[str, Any]:
    """Return the fields of an Example except its audio."""
    utterance = line.said
    return {
        "id": utterance.id,
        "split": utterance.split,
        "text": line.transcript,
        "speaker": line.speaker,
        "meta": {
            "gender": utterance.gender,
            "variant": utterance.variant,
            "rate_wpm": str(utterance.rate_wpm),
            "pitch": str(utterance.pitch),
            "origin": utterance.origin,
            "planted": line.fault,
            "spoken": utterance.text,
        },
    }
