"""Guard sets of a tuned model: its WER on each against that of its base model, and whether the increase is allowed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from pipelines.speech import scoring
from pipelines.speech.intervals import Units, ratio


@dataclass(frozen=True)
class GuardScore:
    """The score of one guard set. Word error rates are normalised, as fractions."""

    name: str
    language: str
    n: int
    speakers: int
    over: str
    """What the interval resamples: speakers, or clips."""
    before: float
    """WER of the base model."""
    after: float
    """WER of the tuned model."""
    delta: float
    ci95: tuple[float, float] | None
    """95 % interval of `delta`, paired over speakers."""
    max_increase: float

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> GuardScore:
        """Return the score that `as_dict` gave."""
        interval = fields["ci95"]
        return cls(**{**fields, "ci95": tuple(interval) if interval else None})

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self) | {"ci95": list(self.ci95) if self.ci95 else None}

    @property
    def violated(self) -> bool:
        """True if the WER rose by more than the allowed increase."""
        return self.delta > self.max_increase

    @property
    def interval(self) -> str:
        """Return the interval of the increase for people."""
        return Units(self.over, self.n, self.speakers).interval(self.ci95, "{:+.3f}")

    @property
    def verdict(self) -> str:
        """Return in words whether the guard is kept, and how sure that is."""
        low, high = self.ci95 or (self.delta, self.delta)
        limit = f"an increase of {self.max_increase:.3f} is allowed"
        if self.violated:
            return f"VIOLATED: {limit}" + ("" if low > self.max_increase else ", and the interval includes it")
        return f"kept: {limit}" + ("" if high <= self.max_increase else ", but the interval goes beyond it")

    def __str__(self) -> str:
        wers = f"{self.before:.3f} -> {self.after:.3f}  {self.delta:+.3f}"
        return f"{self.name:<16}{wers} ({self.interval})  {self.verdict}"


def compare(
    name: str, language: str, max_increase: float, before: pd.DataFrame, after: pd.DataFrame, **draws: int
) -> GuardScore:
    """Return the score of a guard from the predictions of the base model and of the tuned model on the same clips.

    `draws`: `samples` and `seed` of the bootstrap.
    """
    texts = [(table["reference"].tolist(), table["hypothesis"].tolist()) for table in (after, before)]
    ours, theirs = (scoring.count_edits(*pair) for pair in texts)
    difference = scoring.difference(ours, theirs, after["speaker"].tolist(), **draws)
    return GuardScore(
        name,
        language,
        difference.n,
        difference.speakers,
        difference.over,
        before=ratio(theirs.word_edits, theirs.words),
        after=ratio(ours.word_edits, ours.words),
        delta=difference.delta,
        ci95=difference.ci95,
        max_increase=max_increase,
    )


def describe(guards: Iterable[GuardScore]) -> str:
    """Return the lines that show guards after a score; empty if there are none."""
    if not (lines := [f"  {guard}" for guard in guards]):
        return ""
    return "\n".join(["guard sets: WER of the base model -> of this model, increase with 95 % interval", *lines])


def warning(guards: Iterable[GuardScore]) -> str:
    """Return the line about violated guards; empty if all are kept."""
    broken = [f"{guard.name} (WER {guard.before:.3f} -> {guard.after:.3f})" for guard in guards if guard.violated]
    if not broken:
        return ""
    return (
        f"warning: the model has become worse than allowed on {', '.join(broken)}. Mix it with its base model: "
        "python -m pipelines merge --help"
    )
