"""Curation steps over the metadata of a whole corpus, each counted before and after."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field

from pipelines.features.sources import Example
from pipelines.speech import marks, text

logger = logging.getLogger(__name__)

CLIP_STEPS = {
    "usable": (),
    "duration": ("too_short", "too_long"),
    "level": ("silent", "quiet", "clipped"),
    "speaking_rate": ("slow_speech", "fast_speech"),
    "silence": ("silence",),
    "noise": ("noisy",),
}
"""Steps of the clip filter and their rejection reasons; a reason that is not listed belongs to `usable`."""
ORDER = (
    "text",
    "leak_speaker",
    "leak_sentence",
    "votes",
    "duplicate_sentence",
    "speaker_cap",
    "balance",
    "non_speech",
    *CLIP_STEPS,
    "leak_audio",
    "duplicate_audio",
    "reviewed",
    "label_error",
)
"""All steps in the order in which they run."""


@dataclass(frozen=True)
class Drop:
    """A row that is not used: a line of rejected.csv."""

    id: str
    split: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Count:
    """Effect of one step; `changed` rows stay, with another transcript."""

    step: str
    before: int
    after: int
    dropped: int
    changed: int = 0


@dataclass(frozen=True)
class Repair:
    """A row whose transcript was replaced: a line of repaired.csv."""

    before: str
    after: str
    labels: list[int]
    """Token ids of `after`."""


@dataclass
class Selection:
    """Rows that curation steps dropped and repaired, by id, and the counts of the steps in order."""

    dropped: dict[str, Drop] = field(default_factory=dict)
    counts: list[Count] = field(default_factory=list)
    repaired: dict[str, Repair] = field(default_factory=dict)

    def rows(self) -> list[dict[str, str]]:
        """Return the dropped rows as lines of rejected.csv."""
        return [asdict(drop) for drop in self.dropped.values()]

    def table(self) -> list[dict[str, int | str]]:
        """Return the counts for JSON."""
        return [asdict(count) for count in self.counts]


class Step:
    """A curation step: it sees every remaining row (`observe`), then judges each training row (`verdict`)."""

    name: str
    """Also the rejection reason of the rows that it drops."""

    def observe(self, example: Example) -> None:
        """Collect information about all rows that the verdicts need."""

    def verdict(self, example: Example) -> str | None:
        """Return the reason for dropping this training row, or None."""
        raise NotImplementedError


def select(outline: Callable[[], Iterable[Example]], steps: Iterable[Step]) -> Selection:
    """Run the steps one after another, each on the rows that the previous one kept.

    `outline()` returns a new iterator over the rows of all splits; no audio is read. Memory grows with the dropped
    rows and the steps' notes, not with the corpus.
    """
    selection = Selection()
    for step in steps:
        for example in _remaining(outline, selection):
            step.observe(example)
        before, drops = 0, []
        for example in _remaining(outline, selection):
            before += 1
            detail = step.verdict(example) if example.split == "train" else None
            if detail:
                drops.append(Drop(example.id, example.split, step.name, detail))
        selection.dropped.update((drop.id, drop) for drop in drops)
        selection.counts.append(Count(step.name, before, before - len(drops), len(drops)))
    return selection


def _remaining(outline: Callable[[], Iterable[Example]], selection: Selection) -> Iterator[Example]:
    return (example for example in outline() if example.id not in selection.dropped)


def text_count(outline: Callable[[], Iterable[Example]]) -> Count:
    """Count the transcripts that `text.clean` changes: it drops none and changes no word."""
    rows = changed = 0
    for example in outline():
        rows += 1
        changed += text.clean(example.text) != example.text
    return Count("text", rows, rows, 0, changed)


def log_marks(outline: Callable[[], Iterable[Example]], removed: bool) -> None:
    """Log how many transcripts have marks that may not be spoken, with the number and an example of each kind."""
    kinds, n, n_with = Counter(), 0, 0
    examples: dict[str, str] = {}
    for example in outline():
        found = list(marks.find(example.text))
        n, n_with = n + 1, n_with + bool(found)
        kinds.update({kind for kind, _ in found})
        for kind, mark in found:
            examples.setdefault(kind, f"{mark!r} in {example.id}")
    if not n_with:
        return
    listed = ", ".join(f"{count:,} with {kind} ({examples[kind]})" for kind, count in kinds.most_common())
    what = "timestamps are dropped, the others stay as text (--set curation.marks=remove removes them)"
    logger.info(
        f"note: {n_with:,} of {n:,} transcripts have marks that may not be spoken: {listed}; "
        + ("they are removed, and HTML entities replaced" if removed else what)
    )


def clip_step_counts(before: int, reasons: Iterable[str]) -> list[Count]:
    """Return the counts of the clip filter's steps from the rows before it and its rejection reasons."""
    step_of = {reason: step for step, step_reasons in CLIP_STEPS.items() for reason in step_reasons}
    dropped = dict.fromkeys(CLIP_STEPS, 0)
    for reason in reasons:
        dropped[step_of.get(reason, "usable")] += 1
    counts = []
    for step, n in dropped.items():
        counts.append(Count(step, before, before - n, n))
        before -= n
    return counts


@dataclass
class Votes(Step):
    """Drop rows with too few votes for them or too many against. Rows without votes pass."""

    min_up: int
    max_down: int
    """-1: no limit."""
    name: str = "votes"

    def verdict(self, example: Example) -> str | None:
        up, down = (_number(example.meta.get(key, "")) for key in ("up_votes", "down_votes"))
        if up is not None and up < self.min_up:
            return f"{up} for it, at least {self.min_up} wanted"
        if down is not None and 0 <= self.max_down < down:
            return f"{down} against it, at most {self.max_down} wanted"
        return None


@dataclass
class Duplicates(Step):
    """Drop all but the first of the training rows with equal keys; rows with an empty key pass."""

    name: str
    key: Callable[[Example], str]
    seen: dict[str, str] = field(default_factory=dict)

    def verdict(self, example: Example) -> str | None:
        key = self.key(example)
        first = self.seen.setdefault(key, example.id) if key else example.id
        return None if first == example.id else f"the same as {first}"


def duplicate_sentences() -> Duplicates:
    """Drop repetitions of a sentence, normalised, by one speaker; unknown speakers cannot be compared."""

    def key(example: Example) -> str:
        sentence = text.normalise(example.text)
        speaker = text.speaker_key(example.speaker)
        return f"{speaker}\0{sentence}" if speaker and sentence else ""

    return Duplicates("duplicate_sentence", key)


@dataclass
class Thin(Step):
    """Keep at most `cap(sizes)` training rows of each group, drawn by `seed`; rows of the group "" pass.

    A row's rank in the draw is a hash of seed and id: a new row can displace another, but never reorders the rest.
    """

    name: str
    group: Callable[[Example], str]
    cap: Callable[[list[int]], int]
    seed: int
    ranks: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    last: dict[str, int] | None = None
    """Highest rank that is kept, by group; computed at the first verdict."""

    def observe(self, example: Example) -> None:
        if example.split == "train" and (group := self.group(example)):
            self.ranks[group].append(self._rank(example))

    def verdict(self, example: Example) -> str | None:
        if self.last is None:
            cap = self.cap([len(ranks) for ranks in self.ranks.values()])
            self.last = {group: sorted(ranks)[min(cap, len(ranks)) - 1] for group, ranks in self.ranks.items()}
        group = self.group(example)
        if not group or self._rank(example) <= self.last[group]:
            return None
        return f"{len(self.ranks[group])} rows of {group!r}, thinned"

    def _rank(self, example: Example) -> int:
        return int.from_bytes(hashlib.blake2b(f"{self.seed} {example.id}".encode(), digest_size=8).digest(), "big")


def balance(column: str, ratio: float, seed: int) -> Thin:
    """Limit the largest group of a metadata column to `ratio` times the smallest."""
    return Thin(
        "balance", lambda example: example.meta.get(column, ""), lambda sizes: int(ratio * min(sizes, default=0)), seed
    )


def speaker_cap(most: int, seed: int) -> Thin:
    """Keep at most `most` rows of one speaker."""
    return Thin("speaker_cap", lambda example: text.speaker_key(example.speaker), lambda sizes: most, seed)


@dataclass
class NonSpeech(Thin):
    """Keep training rows with an empty transcript up to `share` of all training rows; at least one."""

    share: float = 0.0
    n_speech: int = 0

    def observe(self, example: Example) -> None:
        self.n_speech += example.split == "train" and not self.group(example)
        super().observe(example)


def non_speech(share: float, seed: int) -> NonSpeech:
    """Keep at most this share, 0 to 0.5, of training rows without speech."""

    def group(example: Example) -> str:
        return "" if text.clean(example.text) else "without speech"

    def cap(sizes: list[int]) -> int:
        return max(1, int(step.n_speech * share / (1 - share)))

    step = NonSpeech("non_speech", group, cap, seed, share=share)
    return step


def _number(cell: str) -> int | None:
    try:
        return int(float(cell))
    except (ValueError, OverflowError):
        return None
