"""WER and CER with 95 % intervals, differences with p-values; the only definition of a score in the lab.

`edits.py` counts errors, `intervals.py` estimates how far chance may move them. Two sources of chance are considered:
which speakers are in the test set, and, when several runs of a recipe are given, which seed trained the model. With
one speaker, or if they are unknown, the first is replaced by which clips are in it, and every result says so (`over`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipelines.infra.errors import LabError
from pipelines.speech.edits import Edits, count_edits
from pipelines.speech.intervals import CLIPS, SPEAKERS, Units, bootstrap_ci95, group, ratio, seed_noise, sign_flip_p


@dataclass(frozen=True)
class Score:
    """Error rates over a set of utterances: sums of edits over sums of reference words, not averages of ratios."""

    wer: float
    """(substitutions + insertions + deletions) / words; can exceed 1."""
    ci95: tuple[float, float] | None
    """95 % interval of `wer`, by bootstrap over speakers or clips, see `over`; None if there are too few to vary."""
    cer: float
    """The same ratio over characters, spaces included."""
    substitutions: int
    insertions: int
    deletions: int
    words: int
    """Words in the references."""
    n: int
    """Utterances."""
    speakers: int
    """Speakers; 0 if they are unknown."""
    normalised: bool
    """True if case and punctuation were removed (text.normalise)."""
    cer_ci95: tuple[float, float] | None = None
    """95 % interval of `cer`; None in old reports, and as for `ci95`."""
    over: str = SPEAKERS
    """What the intervals resample: `speakers`, or `clips` if there is one speaker or they are unknown."""

    @property
    def units(self) -> Units:
        return Units(self.over, self.n, self.speakers)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        interval = self.units.interval(self.ci95, to="-")
        return f"WER {self.wer:.3f} (95 % {interval}, n = {self.n}, {self.units.who}), CER {self.cer:.3f}"


@dataclass(frozen=True)
class Difference:
    """The difference in WER between two systems on the same utterances."""

    delta: float
    """WER of the first system minus WER of the second: negative if the first is better."""
    ci95: tuple[float, float] | None
    """95 % interval of `delta`, over speakers or clips, see `over`; None if there are too few to vary."""
    p: float
    """Two-sided p-value: the probability of a difference at least as large if the systems are equal. At least
    2 / 2^units (of those on which they differ), so five speakers cannot show a difference at the 0.05 level."""
    speakers: int
    """Speakers; 0 if they are unknown."""
    seeds: tuple[int, int]
    """Runs on each side. With one on each, `ci95` and `p` describe these two models, not their recipes: another seed
    may change either model."""
    n: int = 0
    """Utterances."""
    over: str = SPEAKERS
    """What `ci95` and `p` resample: `speakers`, or `clips`, which says nothing about other speakers."""

    @property
    def units(self) -> Units:
        return Units(self.over, self.n, self.speakers)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        interval, p = self.units.interval(self.ci95, "{:+.3f}"), f"p = {self.p:.2g}{self.units.suffix}"
        runs = "" if self.seeds == (1, 1) else f", {self.seeds[0]} against {self.seeds[1]} runs"
        return f"ΔWER {self.delta:+.3f} (95 % {interval}, {p}, {self.units.who}{runs})"


@dataclass(frozen=True)
class SeedsScore:
    """The WER of a recipe: several runs that differ only in their seed, on the same utterances."""

    wer: float
    """Mean of `wers`."""
    ci95: tuple[float, float] | None
    """95 % interval of `wer` over speakers (or clips, see `over`) and seeds; without seeds if there is one run."""
    wers: tuple[float, ...]
    """WER of each run."""
    speakers: int
    """Speakers; 0 if they are unknown."""
    n: int = 0
    """Utterances."""
    over: str = SPEAKERS

    @property
    def units(self) -> Units:
        return Units(self.over, self.n, self.speakers)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        interval = self.units.interval(self.ci95, to="-")
        return f"WER {self.wer:.3f} (95 % {interval}, {len(self.wers)} runs, {self.units.who})"


def score(
    references: Sequence[str],
    hypotheses: Sequence[str],
    speakers: Sequence[str] | None = None,
    *,
    normalised: bool = True,
    samples: int = 1_000,
    seed: int = 13,
) -> Score:
    """Score `hypotheses` against `references`, utterance by utterance.

    `speakers` names the speaker of each utterance. Utterances of one speaker are not independent, so the bootstrap
    draws `samples` sets of speakers with replacement and takes all their utterances (Bisani & Ney 2004, with speakers
    as blocks). One speaker, or unknown ones, give no such interval: clips are drawn then (intervals.group). Raises
    LabError for no utterance, unequal lengths (also of `speakers`), a reference without a word, or texts that are None.
    """
    edits = count_edits(references, hypotheses, normalised=normalised)
    return score_edits(edits, speakers, normalised=normalised, samples=samples, seed=seed)


def score_edits(
    edits: Edits,
    speakers: Sequence[str] | None = None,
    *,
    normalised: bool = True,
    samples: int = 1_000,
    seed: int = 13,
) -> Score:
    """Return the score of counted edits; `normalised` records how they were counted."""
    blocks, units = group(speakers, len(edits.words))
    draw = {"samples": samples, "seed": seed}
    return Score(
        wer=ratio(edits.word_edits, edits.words),
        ci95=_of_rate(bootstrap_ci95(edits.word_edits, edits.words, blocks, **draw), units),
        cer_ci95=_of_rate(bootstrap_ci95(edits.char_edits, edits.chars, blocks, **draw), units),
        cer=ratio(edits.char_edits, edits.chars),
        substitutions=int(edits.substitutions.sum()),
        insertions=int(edits.insertions.sum()),
        deletions=int(edits.deletions.sum()),
        words=int(edits.words.sum()),
        n=units.n,
        speakers=units.speakers,
        normalised=normalised,
        over=units.over,
    )


def difference(
    ours: Edits, theirs: Edits, speakers: Sequence[str] | None = None, *, samples: int = 1_000, seed: int = 13
) -> Difference:
    """Return the WER of `ours` minus that of `theirs` on the same utterances: a comparison of two models.

    Paired: each resample draws speakers and takes all their utterances from both sides (Bisani & Ney 2004), so
    variation that both share cancels out. `p` is from the sign-flip permutation test over speakers: if the systems are
    equal, each speaker's difference is as likely to have the opposite sign (approximate randomisation, Noreen 1989,
    with speakers as units).
    """
    return difference_over_seeds([ours], [theirs], speakers, samples=samples, seed=seed)


def difference_over_seeds(
    ours: Sequence[Edits],
    theirs: Sequence[Edits],
    speakers: Sequence[str] | None = None,
    *,
    others: Sequence[Sequence[Edits]] = (),
    untuned: tuple[bool, bool] = (False, False),
    samples: int = 1_000,
    seed: int = 13,
) -> Difference:
    """Return the mean WER of the runs `ours` minus that of the runs `theirs`: a comparison of two recipes.

    Two sources of variance are added. Speakers: paired, as in `difference`, over the means of the runs. Seeds:
    Student's t with the variance between runs, pooled over both sides. The sides are independent even if they used the
    same seed numbers, because another recipe draws other random numbers from the same seed. Runs are not resampled:
    with two runs that finds half the variance, and covers 84 to 88 % if seeds matter. A run's random effect on single
    speakers is counted in both sources, so the interval tends to be too wide and `p` too large.

    With one run on each side this equals `difference`; the variance of a side with two or more runs also stands for a
    side with one. `others` are the runs of further recipes in the same comparison: they are pooled into the variance
    between seeds, as in an analysis of variance. Without them, two seeds on each side leave two degrees of freedom and
    an interval twice as wide as ten do. `untuned` marks a side that was not trained, so that no seed affects it.
    """
    _check_comparable(ours, theirs, *others)
    sides, words = [np.stack([run.word_edits for run in runs]) for runs in (ours, theirs)], ours[0].words
    blocks, units = group(speakers, len(words))
    gained = sides[0].mean(axis=0) - sides[1].mean(axis=0)
    wers = [side.sum(axis=1) / words.sum() for side in sides]
    other_wers = _wers(others, words)
    noise = seed_noise(wers, other_wers, samples, seed, untuned)
    p_noise = seed_noise(wers, other_wers, 10 * samples, seed, untuned) * words.sum()
    return Difference(
        delta=ratio(gained, words),
        ci95=bootstrap_ci95(gained, words, blocks, samples=samples, seed=seed, noise=noise),
        p=sign_flip_p(sides, blocks, p_noise),
        speakers=units.speakers,
        seeds=(len(ours), len(theirs)),
        n=units.n,
        over=units.over,
    )


def score_over_seeds(
    runs: Sequence[Edits],
    speakers: Sequence[str] | None = None,
    *,
    others: Sequence[Sequence[Edits]] = (),
    samples: int = 1_000,
    seed: int = 13,
) -> SeedsScore:
    """Return the mean WER of a recipe's runs on the same utterances; `others` as in `difference_over_seeds`.

    Two seeds alone leave one degree of freedom and an uninformative interval: pass the comparison's other recipes.
    """
    _check_comparable(runs, *others)
    edits, words = np.stack([run.word_edits for run in runs]), runs[0].words
    (blocks, units), wers = group(speakers, len(words)), edits.sum(axis=1) / words.sum()
    noise = seed_noise([wers], _wers(others, words), samples, seed)
    return SeedsScore(
        wer=float(wers.mean()),
        ci95=_of_rate(
            bootstrap_ci95(edits.mean(axis=0), words, blocks, samples=samples, seed=seed, noise=noise), units
        ),
        wers=tuple(wers.tolist()),
        speakers=units.speakers,
        n=units.n,
        over=units.over,
    )


def _wers(recipes: Sequence[Sequence[Edits]], words: np.ndarray) -> list[np.ndarray]:
    """Return the WER of each run, one array float [runs] per recipe."""
    return [np.array([ratio(run.word_edits, words) for run in runs]) for runs in recipes]


def _check_comparable(*sides: Sequence[Edits]) -> None:
    """Raise LabError unless every side has a run and all runs have the same references."""
    if not all(sides):
        raise LabError("systems are compared by at least one run of each, got none: score one first")
    first = sides[0][0]
    if not all(np.array_equal(run.words, first.words) for runs in sides for run in runs):
        raise LabError("systems are compared on the same references in the same order: these are different ones")


def _of_rate(interval: tuple[float, float] | None, units: Units) -> tuple[float, float] | None:
    """Clip the lower end of an error rate's interval at 0; return None for equal clips, whose interval has no width."""
    if interval is None or (units.over == CLIPS and interval[0] == interval[1]):
        return None
    return max(interval[0], 0.0), interval[1]
