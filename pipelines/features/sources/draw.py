"""Draw the splits of a corpus that names none: 80 % train, 10 % validation, 10 % test, and none of them empty.

Whole speakers are drawn where that leaves no split empty, or where there are enough of them to move some. Fewer
speakers cannot be held out: then whole sentences are drawn, and a model is scored on its own speakers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.features.sources import SPLITS, lines_sha256
from pipelines.speech import text
from pipelines.speech.intervals import MIN_SPEAKERS

MAX_COMMANDS, MIN_REPETITIONS = 9, 10
"""A corpus of so few sentences, each repeated so often, holds commands. It is drawn by file: a model that never saw a
command cannot be scored on it."""


@dataclass(frozen=True)
class Draw:
    """The drawn splits of a corpus."""

    splits: list[str]
    """The split of each row."""
    units: str
    """What was drawn: `speakers`, `files` or `sentences`."""
    shared_speakers: frozenset[str] = frozenset()
    """Speakers whose rows are in several splits, because speakers were not drawn."""


def draw_splits(speakers: Sequence[str], stems: Sequence[str], texts: Sequence[str], seed: int) -> Draw:
    """Draw the split of each row by hashes of `seed` and its speaker, else of its file (`stems`) or its sentence.

    A new row changes the split of no other row, as long as no split was empty without it. Files of unknown speakers
    with one sentence are in one split. Splits stay empty if there are fewer than three units to draw.
    """
    sentences = [text.normalise(one) for one in texts]
    distinct = len({*sentences})
    if distinct < len(SPLITS) or (distinct <= MAX_COMMANDS and len(sentences) >= MIN_REPETITIONS * distinct):
        sentences = [""] * len(sentences)
    first_file: dict[str, str] = {}
    for stem, sentence in sorted(zip(stems, sentences, strict=True)):
        first_file.setdefault(sentence, stem)
    files = [f"file {first_file[one] if one else stem}" for stem, one in zip(stems, sentences, strict=True)]
    units = [f"speaker {speaker}" if speaker else file for speaker, file in zip(speakers, files, strict=True)]
    splits, named_speakers = _by_hash(units, seed), {*speakers} - {""}
    if {*SPLITS} <= {*splits.values()} or len(named_speakers) >= MIN_SPEAKERS:
        splits = _filled(splits, seed)
        return Draw([splits[unit] for unit in units], "speakers" if named_speakers else "files")
    units = [f"sentence {one}" if one else file for file, one in zip(files, sentences, strict=True)]
    splits = _filled(_by_hash(units, seed), seed, len({*units}) // 10)
    drawn = [splits[unit] for unit in units]
    splits_per_speaker = Counter(speaker for speaker, _ in {*zip(speakers, drawn, strict=True)} if speaker)
    shared = frozenset(speaker for speaker, n in splits_per_speaker.items() if n > 1)
    return Draw(drawn, "sentences" if any(sentences) else "files", shared)


def share(unit: str, seed: int) -> float:
    """Return the position of a unit in the draw: 0 to 1, independent of all other units."""
    return int(lines_sha256([str(seed), unit])[:12], 16) / 16**12


def _by_hash(units: Sequence[str], seed: int) -> dict[str, str]:
    positions = {unit: share(unit, seed) for unit in units}
    return {unit: "train" if x < 0.8 else "validation" if x < 0.9 else "test" for unit, x in positions.items()}


def _filled(splits: dict[str, str], seed: int, least: int = 1) -> dict[str, str]:
    """Return the splits of all units; one with fewer than `least` (at least 1) gets more, in the order of the draw."""
    splits = dict(splits) if len(splits) > 1 else dict.fromkeys(splits, "train")
    for lacking in ("train", "validation", "test"):
        nearest = min if lacking == "train" else max
        while (counts := Counter(splits.values()))[lacking] < max(1, least):
            donor, n = max(counts.items(), key=lambda item: item[1])
            if n < 2:
                break
            candidates = [unit for unit, split in splits.items() if split == donor]
            splits[nearest(candidates, key=lambda unit: share(unit, seed))] = lacking
    return splits
