"""Sentences of the tour corpus: a hand-written Swedish list, and more from a small grammar."""

from __future__ import annotations

import random
import re
from functools import lru_cache
from pathlib import Path

from pipelines.features.sources.synthetic.tour_grammar import FRAMES
from pipelines.infra.errors import LabError

SENTENCES_PATH = Path(__file__).with_name("tour_sentences.txt")


def normalise(text: str) -> str:
    """Return the text in lower case, without punctuation and with single spaces, for comparing sentences."""
    return " ".join(re.sub(r"[^\w\s]", " ", text.lower()).split())


def hand_sentences() -> list[str]:
    """Return the hand-written sentences in the file's order, without its headings."""
    try:
        lines = SENTENCES_PATH.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise LabError(f"The tour corpus's sentences {SENTENCES_PATH} cannot be read ({error.strerror})") from error
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def grammar_sentences(count: int, seed: int) -> list[str]:
    """Return `count` distinct sentences of the grammar, none of them in hand_sentences().

    Frames take turns, so that one with many combinations does not dominate. A smaller count with the same seed returns
    the head of a larger one. Raises LabError for a count below zero or above grammar_size().
    """
    frames = [list(sentences) for sentences in _frames()]
    available = sum(map(len, frames))
    if not 0 <= count <= available:
        raise LabError(f"The tour grammar has from 0 to {available} sentences, got {count}")
    rng = random.Random(f"tour grammar {seed}")
    for sentences in frames:
        rng.shuffle(sentences)
    chosen: list[str] = []
    while len(chosen) < count:
        frames = [sentences for sentences in frames if sentences]
        rng.shuffle(frames)
        chosen += [sentences.pop() for sentences in frames]
    return chosen[:count]


def grammar_size() -> int:
    """Return the number of distinct sentences of the grammar."""
    return sum(map(len, _frames()))


@lru_cache(maxsize=1)
def _frames() -> tuple[tuple[str, ...], ...]:
    """Return the sentences of every frame, each once, without hand-written ones."""
    seen = {normalise(text) for text in hand_sentences()}
    frames = []
    for frame in FRAMES:
        fresh = {normalise(text): text for text in map(_sentence, frame())}
        frames.append(tuple(text for key, text in fresh.items() if key not in seen))
        seen.update(fresh)
    return tuple(frames)


def _sentence(text: str) -> str:
    """Capitalise the first letter, and add a full stop unless the frame has a final punctuation mark."""
    text = text[0].upper() + text[1:]
    return text if text[-1] in ".?!" else text + "."
