"""Lists of sentences to read aloud, and an order in which the first ones cover as much as possible."""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable
from pathlib import Path

from pipelines.features.sources.synthetic import tour_text
from pipelines.infra.errors import LabError
from pipelines.infra.tables import read_text
from pipelines.speech import text

TOUR = "tour"
"""Name of the list of the tour's hand-written sentences."""
MAX_CHARS = 250
"""Longer sentences take more than half of the 30 s that Whisper reads at once."""
MAX_SENTENCES = 20_000
MAX_CHOSEN = 1_000
"""Sentences that are put into the order of coverage: each choice looks at many of the others."""
_CLUSTER = re.compile(r"[bcdfghjklmnpqrstvwxz]{2,}")
_TERM_WEIGHT, _CLUSTER_WEIGHT, _LETTER_WEIGHT = 100.0, 2.0, 1.0
"""Gain of a term, a cluster of consonants and a letter that no earlier sentence has; å, ä and ö count as clusters."""


def read_sentences(source: str) -> list[str]:
    """Return the sentences of `tour`, or of a text file with one sentence in each line, each once.

    Empty lines and lines that begin with # are skipped. Raises LabError for a file that cannot be used.
    """
    if source == TOUR:
        return tour_text.hand_sentences()
    return _read_lines(Path(source).expanduser(), "--sentences", "sentence")


def read_terms(path: Path) -> list[str]:
    """Return the words or phrases of a text file, one in each line. Raises LabError for a file that cannot be used."""
    return _read_lines(path.expanduser(), "--terms", "term")


def order_by_coverage(sentences: list[str], terms: Iterable[str] = (), count: int = 0) -> list[str]:
    """Return the sentences in greedy order: each adds most to the letters, clusters of consonants and terms so far.

    The gain of a sentence is divided by the number of its words, so that long sentences have no advantage. A unit that
    has been covered n times gains 1 / (n + 1)² of its weight. A term that no sentence contains is read alone. The same
    arguments give the same order. Only the first `count` are chosen so (0: MAX_CHOSEN); the others follow as listed.
    """
    term_of = {text.normalise(term): term for term in terms}
    words = [f" {text.normalise(sentence)} " for sentence in sentences]
    together = "\n".join(words)
    alone = [term for term in term_of if f" {term} " not in together]
    sentences = [*sentences, *(term_of[term] for term in alone)]
    units = [_units(one, term_of) for one in [*words, *(f" {term} " for term in alone)]]
    counts: dict[str, int] = {}

    def gain(index: int) -> float:
        total = sum(weight / (1 + counts.get(unit, 0)) ** 2 for unit, weight in units[index].items())
        return total / max(1, len(sentences[index].split()))

    # a gain only falls as units are covered: an entry whose gain is still the largest after an update is the best
    heap = [(-gain(index), index) for index in range(len(sentences))]
    heapq.heapify(heap)
    order = []
    while heap:
        _, index = heapq.heappop(heap)
        current = -gain(index)
        if len(order) >= (count or MAX_CHOSEN):
            order += [sentences[one] for one in sorted([index, *(other for _, other in heap)])]
            break
        if heap and (current, index) > heap[0]:
            heapq.heappush(heap, (current, index))
            continue
        order.append(sentences[index])
        for unit in units[index]:
            counts[unit] = counts.get(unit, 0) + 1
    return order


def _units(words: str, terms: Iterable[str]) -> dict[str, float]:
    """Return the weight of each letter, cluster and term that a normalised sentence between blanks contains."""
    units = {letter: _LETTER_WEIGHT for letter in words if letter.isalpha()}
    units |= {letter: _CLUSTER_WEIGHT for letter in "åäö" if letter in words}
    units |= dict.fromkeys(_CLUSTER.findall(words), _CLUSTER_WEIGHT)
    return units | {f"term {term}": _TERM_WEIGHT for term in terms if f" {term} " in words}


def _read_lines(path: Path, option: str, what: str) -> list[str]:
    if not path.is_file():
        also = f", or `{TOUR}`" if option == "--sentences" else ""
        raise LabError(f"{option} takes a text file with one {what} in each line{also}, got {str(path)!r}: correct it")
    cleaned = ((number, text.clean(line)) for number, line in enumerate(read_text(path).splitlines(), 1))
    lines: dict[str, str] = {}
    for number, line in cleaned:
        if not line or line.startswith("#"):
            continue
        if len(line) > MAX_CHARS:
            raise LabError(
                f"{path.name} line {number}: a {what} has at most {MAX_CHARS} characters, got {len(line):,}: "
                f"write one {what} in each line"
            )
        if not text.normalise(line):
            raise LabError(f"{path.name} line {number}: a {what} must contain a word, got {line[:40]!r}: remove it")
        lines.setdefault(text.normalise(line), line)
    if not lines:
        raise LabError(f"{path} must hold at least one {what}, got none: write one in each line")
    if len(lines) > MAX_SENTENCES:
        raise LabError(f"{path.name} has {len(lines):,} lines, at most {MAX_SENTENCES:,} can be used: shorten it")
    return list(lines.values())
