"""The corpus `planted`: the tour's speech with faults planted in its training split, each of them known.

What real corpora have and nobody counts: wrong transcripts, noise, clipping, copies, clips of the test's speakers and
sentences, mostly men. Here it is known which clip has which, so that what curation finds can be counted, too. The
truth stands in two columns that no step of curation reads: `planted` (one of FAULTS, or empty) and `spoken` (what is
really said). Validation and test are clean, and the same whatever is planted.
"""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from pipelines.features.sources import SPLITS, Example
from pipelines.features.sources.synthetic import espeak, tour
from pipelines.features.sources.synthetic.tour import Persona, Utterance
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
"""Every value of the column `planted`.

label_swap      the transcript is another clip's
label_word      one word of the transcript was dropped, doubled or exchanged
noise           white or pink noise, from 5 dB above the speech to 5 dB below it
clipping        a quarter of the samples at full scale
duplicate       the very clip once more (the first of its kind counts as clean)
leak_speaker    said by a speaker of the test
leak_sentence   a sentence of the test, without its capital letter and full stop
leak_audio      a clip of the test under another speaker's name, one word of the transcript dropped
leak_renamed    said by a speaker of the test under another name: nothing in the corpus tells
"""
PERSONAS = {"train": 8, "validation": 4, "test": 8}
"""Speakers per variant: 48, 8 and 32 speakers."""
NOISE_SNR_DB = (-5.0, 5.0)
CLIPPED_SHARE = 0.25
COPIES = 3
"""Times that a duplicated clip comes again."""
SENTENCE_WORDS = range(3, 13)
"""Words of a sentence that is taken from a file: clips of the tour's length."""


@dataclass(frozen=True)
class Shares:
    """Shares of the training clips that have a fault, 0 to 1; no clip has two. Meanings: FAULTS."""

    label_swap: float = 0.0
    label_word: float = 0.0
    noise: float = 0.0
    clipping: float = 0.0
    duplicate: float = 0.0
    leak: float = 0.0
    """All four kinds of leak, alike."""

    def kinds(self, clips: int, rng: random.Random) -> list[str]:
        """The fault of each of so many clips, or "", in random order."""
        told = {
            fault: getattr(self, fault.partition("_")[0] if fault.startswith("leak") else fault) for fault in FAULTS
        }
        told = {fault: share / 4 if fault.startswith("leak") else share for fault, share in told.items()}
        kinds = [fault for fault, share in told.items() for _ in range(round(share * clips))]
        if len(kinds) > clips:
            raise LabError(f"source.faults must be at most 1 in all, got {sum(told.values()):g}: plant less")
        kinds += [""] * (clips - len(kinds))
        rng.shuffle(kinds)
        return kinds


@dataclass(frozen=True)
class Line:
    """One clip of the plan: what is said, and what the corpus tells of it."""

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
    faults: Shares = field(default_factory=Shares)
    men: float = 0.5
    """Share of the training clips that men speak."""
    sentences: str = ""
    """A text file whose lines are spoken in the training split, in place of the tour's sentences."""

    def identity(self) -> dict[str, str]:
        """Sizes, seed, the whole plan, and the build of espeak-ng that speaks it."""
        lines = "\n".join(map(repr, self.plan()))
        return {
            "kind": "planted",
            "train": str(self.train),
            "validation": str(self.validation),
            "test": str(self.test),
            "seed": str(self.seed),
            "plan_sha256": hashlib.sha256(lines.encode()).hexdigest(),
            "espeak": espeak.version(),
            "espeak_build_sha256": espeak.build_sha256(),
        }

    def plan(self) -> tuple[Line, ...]:
        """Every clip in the corpus's order, without audio: a pure function of the settings."""
        return self._lines

    def examples(self, splits: tuple[str, ...] = SPLITS) -> Iterator[Example]:
        """The examples of these splits in the plan's order, each synthesised when it is asked for."""
        return (_example(line, _sound(line)) for line in self.plan() if line.said.split in splits)

    def outline(self) -> Iterator[Example]:
        """All examples without their audio: nothing is synthesised."""
        return (_example(line, b"") for line in self.plan())

    @cached_property
    def _lines(self) -> tuple[Line, ...]:
        sizes = {"train": self.train, "validation": self.validation, "test": self.test}
        texts = tour.split_texts(sizes, self.seed)
        if self.sentences:
            held_out = [sentence for split in ("validation", "test") for sentence, _ in texts[split]]
            texts["train"] = _sentences_of(Path(self.sentences), self.train, held_out, self.seed)
        voices = {split: tour.personas(split, self.seed, PERSONAS[split]) for split in SPLITS}
        mixed = {**voices, "train": self._by_gender(voices["train"])}
        said = {split: list(tour.turns("planted", split, texts[split], mixed[split], self.seed)) for split in SPLITS}
        clean = {split: [_honest(utterance) for utterance in said[split]] for split in SPLITS}
        clean["train"] = _Planter(clean, voices["test"], self.faults, self.seed).lines()
        return tuple(line for split in SPLITS for line in clean[split])

    def _by_gender(self, voices: list[Persona]) -> list[Persona]:
        """One speaker for each training clip: men and women in their shares, each taking turns among themselves."""
        rng, n_men = random.Random(f"planted men {self.seed}"), round(self.men * self.train)
        men = [True] * n_men + [False] * (self.train - n_men)
        rng.shuffle(men)
        groups = {man: [voice for voice in voices if (voice.variant[3] == "m") == man] for man in (True, False)}
        taken = {True: 0, False: 0}
        speakers = []
        for man in men:
            speakers.append(groups[man][taken[man] % len(groups[man])])
            taken[man] += 1
        return speakers


class _Planter:
    """Turns clean training lines into faulty ones."""

    def __init__(self, clean: dict[str, list[Line]], test_voices: list[Persona], faults: Shares, seed: int):
        self.rng = random.Random(f"planted faults {seed}")
        self.train, self.test = clean["train"], clean["test"]
        heard = {line.speaker for line in self.test}
        self.voices = [voice for voice in test_voices if voice.speaker in heard]  # a small test has fewer
        self.kinds = faults.kinds(len(self.train), self.rng)
        self.words = sorted({word for line in self.train for word in line.transcript.rstrip(".?!").split()[1:]})

    def lines(self) -> list[Line]:
        lines = list(self.train)
        self._swap(lines)
        self._copy(lines)
        alone: dict[str, Callable[[Line], Line]] = {
            "label_word": self._with_another_word,
            "noise": lambda line: line,
            "clipping": lambda line: line,
            "leak_speaker": self._by_a_test_speaker,
            "leak_sentence": self._of_a_test_sentence,
            "leak_audio": self._of_a_test_clip,
            "leak_renamed": self._by_a_renamed_test_speaker,
        }
        for place, kind in enumerate(self.kinds):
            if kind in alone:
                lines[place] = replace(alone[kind](lines[place]), fault=kind)
        return lines

    def _of(self, kind: str) -> list[int]:
        return [place for place, other in enumerate(self.kinds) if other == kind]

    def _swap(self, lines: list[Line]) -> None:
        """Each of the chosen gets the transcript of the next one."""
        places = self._of("label_swap")
        if len(places) == 1:
            raise LabError("source.faults.label_swap must take two clips or none, got one: plant more")
        for place, other in zip(places, [*places[1:], *places[:1]], strict=True):
            lines[place] = replace(lines[place], transcript=self.train[other].transcript, fault="label_swap")

    def _copy(self, lines: list[Line]) -> None:
        """Groups of one clean clip and COPIES that are planted: the first in the corpus's order is the original."""
        copies, originals = self._of("duplicate"), self._of("")
        self.rng.shuffle(copies)
        self.rng.shuffle(originals)
        for start in range(0, len(copies), COPIES):
            if not originals:
                raise LabError("source.faults.duplicate must leave clips that can be copied: plant fewer faults")
            first, *others = sorted([originals.pop(), *copies[start : start + COPIES]])
            for place in others:
                said = replace(lines[first].said, id=lines[place].said.id)
                lines[place] = replace(lines[first], said=said, fault="duplicate")

    def _with_another_word(self, line: Line) -> Line:
        return replace(line, transcript=self._changed(line.transcript))

    def _changed(self, transcript: str) -> str:
        """One word after the first dropped, doubled or exchanged."""
        words = transcript.split()
        place = self.rng.randrange(1, len(words)) if len(words) > 1 else 0
        word = words[place].rstrip(".?!,")
        sign = words[place][len(word) :]
        other = self.rng.choice([known for known in self.words if known != word])
        drop = [] if len(words) > 1 else [other]
        words[place : place + 1] = self.rng.choice([drop, [word, word + sign], [other + sign]])
        return " ".join(words)

    def _by_a_test_speaker(self, line: Line) -> Line:
        voice = self.rng.choice(self.voices)
        said = replace(
            line.said, speaker=voice.speaker, variant=voice.variant, rate_wpm=voice.rate_wpm, pitch=voice.pitch
        )
        return replace(line, said=said, speaker=voice.speaker)

    def _by_a_renamed_test_speaker(self, line: Line) -> Line:
        known = self._by_a_test_speaker(line)
        return replace(known, speaker=f"unknown-{known.speaker}")

    def _of_a_test_sentence(self, line: Line) -> Line:
        sentence = self.rng.choice(self.test).transcript
        transcript = sentence[0].lower() + sentence[1:].rstrip(".")
        return replace(line, said=replace(line.said, text=sentence), transcript=transcript)

    def _of_a_test_clip(self, line: Line) -> Line:
        copied = self.rng.choice(self.test)
        said = replace(copied.said, id=line.said.id, split="train")
        words = copied.transcript.split()
        transcript = " ".join(words[:-1]) if len(words) > 1 else self._changed(copied.transcript)
        return replace(line, said=said, transcript=transcript)


def noisy(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """float [n] with white or pink noise at a signal-to-noise ratio drawn from NOISE_SNR_DB."""
    noise = rng.standard_normal(len(samples))
    if rng.random() < 0.5:  # pink: power falls with frequency
        spectrum = np.fft.rfft(noise)
        noise = np.fft.irfft(spectrum / np.sqrt(np.maximum(np.arange(len(spectrum)), 1)), len(samples))
    snr_db = rng.uniform(*NOISE_SNR_DB)
    wanted = np.square(samples).mean() / 10 ** (snr_db / 10)
    mixed = samples + noise * np.sqrt(wanted / np.square(noise).mean())
    return mixed * min(1.0, 0.95 / np.abs(mixed).max())  # as loud as the format bears: noise is not to clip


def clipped(samples: np.ndarray) -> np.ndarray:
    """float [n], made so loud that CLIPPED_SHARE of the samples that are no silence reach full scale."""
    loud = np.abs(samples)[np.abs(samples) > 0.01 * np.abs(samples).max()]
    return np.clip(samples / np.quantile(loud, 1 - CLIPPED_SHARE), -1.0, 1.0)


def _sentences_of(path: Path, count: int, held_out: list[str], seed: int) -> list[tuple[str, str]]:
    """`count` lines of a text file, drawn by seed, none of them held out: (text, origin) pairs."""
    try:
        found = [line.strip() for line in path.expanduser().read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise LabError(f"source.sentences must name a UTF-8 text file, got {path} ({type(error).__name__})") from None
    taken, chosen = {text.normalise(sentence) for sentence in held_out}, []
    random.Random(f"planted sentences {seed}").shuffle(found)
    for line in found:
        normal = text.normalise(line)
        if len(normal.split()) in SENTENCE_WORDS and normal not in taken:
            taken.add(normal)
            chosen.append((line, "file"))
    if len(chosen) < count:
        raise LabError(
            f"source.sentences must hold {count:,} different lines of {SENTENCE_WORDS[0]} to {SENTENCE_WORDS[-1]} "
            f"words, {path} holds {len(chosen):,}: lower source.train"
        )
    return chosen[:count]


def _honest(utterance: Utterance) -> Line:
    return Line(utterance, utterance.text, utterance.speaker)


def _sound(line: Line) -> bytes:
    said = line.said
    sound = espeak.synthesise(said.text, said.variant, said.rate_wpm, said.pitch)
    if line.fault == "noise":
        digest = hashlib.sha256(f"planted noise {said}".encode()).digest()
        return _treated(sound, lambda samples: noisy(samples, np.random.default_rng(int.from_bytes(digest[:8], "big"))))
    return _treated(sound, clipped) if line.fault == "clipping" else sound


def _treated(sound: bytes, treat: Callable[[np.ndarray], np.ndarray]) -> bytes:
    """A WAV file like `sound` with other samples."""
    import soundfile

    samples, rate_hz = soundfile.read(io.BytesIO(sound), dtype="float64")
    file = io.BytesIO()
    soundfile.write(file, treat(samples), rate_hz, format="WAV", subtype="PCM_16")
    return file.getvalue()


def _example(line: Line, sound: bytes) -> Example:
    said = line.said
    return Example(
        id=said.id,
        split=said.split,
        text=line.transcript,
        audio=sound,
        speaker=line.speaker,
        meta={
            "gender": said.gender,
            "variant": said.variant,
            "rate_wpm": str(said.rate_wpm),
            "pitch": str(said.pitch),
            "origin": said.origin,
            "planted": line.fault,
            "spoken": said.text,
        },
    )
