"""What is decided over a whole corpus by its metadata, step by step, each counted before and after."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field

from pipelines.features.sources import Example
from pipelines.speech import text

GATE_STEPS = {
    "usable": (),
    "duration": ("too_short", "too_long"),
    "level": ("silent", "quiet", "clipped"),
    "speaking_rate": ("slow_speech", "fast_speech"),
    "silence": ("silence",),
    "noise": ("noisy",),
}
"""The gate's steps and the reasons that each gives; a reason that stands nowhere is of `usable`."""
ORDER = (
    "text",
    "leak_speaker",
    "leak_sentence",
    "votes",
    "duplicate_sentence",
    "speaker_cap",
    "balance",
    *GATE_STEPS,
    "leak_audio",
    "duplicate_audio",
    "label_error",
)
"""Every step there is, in the order in which they run."""


@dataclass(frozen=True)
class Drop:
    """A row that is not used: a line of rejected.csv."""

    id: str
    split: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Count:
    """What one step did; `changed` rows stay, with another transcript."""

    step: str
    before: int
    after: int
    dropped: int
    changed: int = 0


@dataclass(frozen=True)
class Repair:
    """A row that got another transcript: a line of repaired.csv."""

    before: str
    after: str
    labels: list[int]
    """Token ids of `after`."""


@dataclass
class Selection:
    """What steps of curation dropped and repaired, by id, and their counts in order."""

    dropped: dict[str, Drop] = field(default_factory=dict)
    counts: list[Count] = field(default_factory=list)
    repaired: dict[str, Repair] = field(default_factory=dict)

    def rows(self) -> list[dict[str, str]]:
        """The dropped as lines of rejected.csv."""
        return [asdict(drop) for drop in self.dropped.values()]

    def table(self) -> list[dict[str, int | str]]:
        """The counts as JSON holds them."""
        return [asdict(count) for count in self.counts]


class Step:
    """A step sees every row that is left (`observe`), then judges each training row (`verdict`).

    `name` is also the reason of whatever it drops.
    """

    name: str

    def observe(self, example: Example) -> None:
        """Note what the verdicts need to know of all rows."""

    def verdict(self, example: Example) -> str | None:
        """Why this training row is dropped, or None."""
        raise NotImplementedError


def select(outline: Callable[[], Iterable[Example]], steps: Iterable[Step]) -> Selection:
    """Run the steps one after another, each on what the one before it has left.

    `outline()` yields the rows of all splits anew at each call; no audio is touched. Memory is that of the dropped
    rows and of what the steps note, not of the corpus.
    """
    selection = Selection()
    for step in steps:
        for example in _left(outline, selection):
            step.observe(example)
        before, drops = 0, []
        for example in _left(outline, selection):
            before += 1
            detail = step.verdict(example) if example.split == "train" else None
            if detail:
                drops.append(Drop(example.id, example.split, step.name, detail))
        selection.dropped.update((drop.id, drop) for drop in drops)
        selection.counts.append(Count(step.name, before, before - len(drops), len(drops)))
    return selection


def _left(outline: Callable[[], Iterable[Example]], selection: Selection) -> Iterator[Example]:
    return (example for example in outline() if example.id not in selection.dropped)


def text_count(outline: Callable[[], Iterable[Example]]) -> Count:
    """How many transcripts `text.clean` changes: it drops none and changes no word."""
    rows = changed = 0
    for example in outline():
        rows += 1
        changed += text.clean(example.text) != example.text
    return Count("text", rows, rows, 0, changed)


def gate_counts(before: int, reasons: Iterable[str]) -> list[Count]:
    """The gate's steps, from the number of rows before it and the reasons of those that it rejected."""
    step_of = {reason: step for step, told in GATE_STEPS.items() for reason in told}
    dropped = dict.fromkeys(GATE_STEPS, 0)
    for reason in reasons:
        dropped[step_of.get(reason, "usable")] += 1
    counts = []
    for step, n in dropped.items():
        counts.append(Count(step, before, before - n, n))
        before -= n
    return counts


@dataclass
class Votes(Step):
    """Too few listeners for, or too many against. Rows whose source tells no votes pass."""

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
    """All but the first of the training rows with one key; rows with an empty key pass."""

    name: str
    key: Callable[[Example], str]
    seen: dict[str, str] = field(default_factory=dict)

    def verdict(self, example: Example) -> str | None:
        key = self.key(example)
        first = self.seen.setdefault(key, example.id) if key else example.id
        return None if first == example.id else f"the same as {first}"


def duplicate_sentences() -> Duplicates:
    """One speaker, one sentence, whatever its case and punctuation; unknown speakers cannot be compared."""

    def key(example: Example) -> str:
        return f"{example.speaker}\0{text.normalise(example.text)}" if example.speaker else ""

    return Duplicates("duplicate_sentence", key)


@dataclass
class Thin(Step):
    """Keep at most `cap(sizes)` training rows of each group, drawn by `seed`; rows of the group "" pass.

    A row's place in the draw is a hash of seed and id: another row can push it out, but never reshuffles the rest.
    """

    name: str
    group: Callable[[Example], str]
    cap: Callable[[list[int]], int]
    seed: int
    places: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    last: dict[str, int] | None = None
    """Per group, the last place that is kept; drawn up at the first verdict."""

    def observe(self, example: Example) -> None:
        if example.split == "train" and (group := self.group(example)):
            self.places[group].append(self._place(example))

    def verdict(self, example: Example) -> str | None:
        if self.last is None:
            cap = self.cap([len(places) for places in self.places.values()])
            self.last = {group: sorted(places)[min(cap, len(places)) - 1] for group, places in self.places.items()}
        group = self.group(example)
        if not group or self._place(example) <= self.last[group]:
            return None
        return f"{len(self.places[group])} rows of {group!r}, thinned"

    def _place(self, example: Example) -> int:
        return int.from_bytes(hashlib.blake2b(f"{self.seed} {example.id}".encode(), digest_size=8).digest(), "big")


def balance(column: str, ratio: float, seed: int) -> Thin:
    """The groups of a column, the largest at most `ratio` times the smallest."""
    return Thin(
        "balance", lambda example: example.meta.get(column, ""), lambda sizes: int(ratio * min(sizes, default=0)), seed
    )


def speaker_cap(most: int, seed: int) -> Thin:
    """At most so many rows of one speaker."""
    return Thin("speaker_cap", lambda example: example.speaker, lambda sizes: most, seed)


def _number(cell: str) -> int | None:
    try:
        return int(float(cell))
    except (ValueError, OverflowError):
        return None
