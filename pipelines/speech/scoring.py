"""WER and CER with 95 % intervals, differences with p-values; the only definition of a score in the lab.

What is drawn is speakers: utterances of one speaker are not independent. Several runs of one recipe, with other seeds,
are a second source of chance beside them. tests/speech/test_scoring.py measures coverage and false alarms by
simulation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipelines.infra.errors import LabError
from pipelines.speech import text

_Z975 = 1.959964
"""97.5 % quantile of the normal distribution."""
_DRAWN_AT_ONCE = 1 << 20
"""Blocks: 8 MB of their numbers, and as much of their edits and words."""


@dataclass(frozen=True)
class Score:
    """Errors over a set of utterances: sums of edits over sums of reference words, never an average of ratios."""

    wer: float
    """(substitutions + insertions + deletions) / words; can exceed 1."""
    ci95: tuple[float, float]
    """95 % interval of `wer`, by bootstrap over speakers (`interval`)."""
    cer: float
    """The same over characters, spaces counted."""
    substitutions: int
    insertions: int
    deletions: int
    words: int
    """Words in the references."""
    n: int
    """Utterances."""
    speakers: int
    """Speakers, the units that the bootstrap draws; where they are unknown, each utterance is its own."""
    normalised: bool
    """Whether case and punctuation were set aside (text.normalise)."""
    cer_ci95: tuple[float, float] | None = None
    """95 % interval of `cer`; None in old reports."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        low, high = self.ci95
        told = f"95 % {low:.3f}-{high:.3f}, n = {self.n}, {self.speakers} speakers"
        return f"WER {self.wer:.3f} ({told}), CER {self.cer:.3f}"


@dataclass(frozen=True)
class Difference:
    """How far two systems are apart on the same utterances."""

    delta: float
    """WER of the one less WER of the other: negative where the one is better."""
    ci95: tuple[float, float]
    """95 % interval of `delta`."""
    p: float
    """Two-sided: how often chance alone sets two equal systems as far apart. At least 2 / 2^speakers (of those on whom
    they differ), so that five speakers can never show a difference at the level of 0.05."""
    speakers: int
    seeds: tuple[int, int]
    """Runs on each side. With one on each, `ci95` and `p` speak of these two models, not of their recipes: another seed
    may move either."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        low, high = self.ci95
        runs = "" if self.seeds == (1, 1) else f", {self.seeds[0]} against {self.seeds[1]} runs"
        return (
            f"ΔWER {self.delta:+.3f} (95 % {low:+.3f} to {high:+.3f}, p = {self.p:.2g}, {self.speakers} speakers{runs})"
        )


@dataclass(frozen=True)
class SeedsScore:
    """The WER of a recipe: several runs, which differ in their seed alone, on the same utterances."""

    wer: float
    """Mean of `wers`."""
    ci95: tuple[float, float]
    """95 % interval of `wer`, for other speakers and other seeds; for other speakers alone where there is one run."""
    wers: tuple[float, ...]
    """Of each run."""
    speakers: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        low, high = self.ci95
        return f"WER {self.wer:.3f} (95 % {low:.3f}-{high:.3f}, {len(self.wers)} runs, {self.speakers} speakers)"


@dataclass(frozen=True)
class Edits:
    """Word and character edits of each utterance; int64 [n] each."""

    substitutions: np.ndarray
    insertions: np.ndarray
    deletions: np.ndarray
    words: np.ndarray
    char_edits: np.ndarray
    chars: np.ndarray

    @property
    def word_edits(self) -> np.ndarray:
        return self.substitutions + self.insertions + self.deletions


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

    `speakers` names who says each utterance: utterances of one speaker are not independent, so the bootstrap draws
    speakers with replacement and takes all their utterances (Bisani & Ney 2004, with speakers as blocks).
    Raises LabError for no utterance, unequal lengths (of speakers, too) or a reference without a word.
    """
    edits = count_edits(references, hypotheses, normalised=normalised)
    return score_of(edits, speakers, normalised=normalised, samples=samples, seed=seed)


def score_of(
    edits: Edits,
    speakers: Sequence[str] | None = None,
    *,
    normalised: bool = True,
    samples: int = 1_000,
    seed: int = 13,
) -> Score:
    """`score` of utterances whose edits are counted already; `normalised` says how they were."""
    blocks = _blocks(speakers, len(edits.words))
    return Score(
        wer=_ratio(edits.word_edits, edits.words),
        ci95=_of_a_rate(interval(edits.word_edits, edits.words, blocks, samples=samples, seed=seed)),
        cer_ci95=_of_a_rate(interval(edits.char_edits, edits.chars, blocks, samples=samples, seed=seed)),
        cer=_ratio(edits.char_edits, edits.chars),
        substitutions=int(edits.substitutions.sum()),
        insertions=int(edits.insertions.sum()),
        deletions=int(edits.deletions.sum()),
        words=int(edits.words.sum()),
        n=len(edits.words),
        speakers=int(blocks.max()) + 1,
        normalised=normalised,
    )


def count_edits(references: Sequence[str], hypotheses: Sequence[str], *, normalised: bool = True) -> Edits:
    """The edits of every utterance by Levenshtein alignment (jiwer), over words and over characters."""
    if len(references) != len(hypotheses) or not len(references):
        raise LabError(
            f"scoring needs one transcript per reference and at least one, "
            f"got {len(references)} references and {len(hypotheses)} transcripts"
        )
    rows = [
        _edits(_form(ref, normalised), _form(hyp, normalised)) for ref, hyp in zip(references, hypotheses, strict=True)
    ]
    return Edits(*(np.array(column, dtype=np.int64) for column in zip(*rows, strict=True)))


def interval(
    edits: np.ndarray,
    words: np.ndarray,
    blocks: np.ndarray,
    *,
    samples: int,
    seed: int,
    noise: np.ndarray | float = 0.0,
) -> tuple[float, float]:
    """95 % interval of sum(edits) / sum(words), drawing whole blocks with replacement.

    `blocks` int64 [n] numbers each utterance's block from 0. `noise` float [samples] is added to the resamples: what
    else may move the ratio. With one block nothing is known, and the interval is a point.

    The percentiles of the resamples are moved away from the ratio by sqrt(k / (k - 1)) t / z, for k blocks: without it
    16 speakers give intervals that cover too seldom, as the bootstrap knows neither that it divides by k instead of
    k - 1 nor that the spread itself is a guess (Hesterberg 2015, "What Teachers Should Know About the Bootstrap"; there
    the levels of the percentiles are moved, which ends at the most extreme of few speakers). Where a few speakers are
    far worse than all others, it still covers less: 92 % with 16, 88 % with 8.
    """
    count = int(blocks.max()) + 1
    block_edits = np.bincount(blocks, weights=edits, minlength=count)
    block_words = np.bincount(blocks, weights=words, minlength=count)
    draws, at_once = np.random.default_rng(seed), max(1, _DRAWN_AT_ONCE // count)
    ratio, apart = _ratio(edits, words), np.empty(samples)
    for at in range(0, samples, at_once):
        drawn = draws.integers(count, size=(min(at_once, samples - at), count))
        apart[at : at + at_once] = block_edits[drawn].sum(axis=1) / block_words[drawn].sum(axis=1) - ratio
    apart *= math.sqrt(count / (count - 1)) * _t975(count - 1) / _Z975 if count > 1 else 1
    low, high = ratio + np.percentile(apart + noise, [2.5, 97.5])
    return float(low), float(high)


def difference(
    ours: Edits, theirs: Edits, speakers: Sequence[str] | None = None, *, samples: int = 1_000, seed: int = 13
) -> Difference:
    """WER of `ours` less that of `theirs` on the same utterances: two models.

    Paired: each resample draws speakers and takes all their utterances from both sides (Bisani & Ney 2004), so that
    what is hard for both does not blur the difference. `p` is that of the sign-flip permutation test over speakers:
    were the systems equal, each speaker's difference could as well have the other sign (approximate randomisation,
    Noreen 1989, with speakers as units). All 2^k assignments are counted, none is drawn (Pagano & Tritchler 1983).
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
    """Mean WER of the runs `ours` less that of the runs `theirs`, on the same utterances: two recipes.

    Two sources of chance are added: speakers, paired, by `difference` over the means of the runs; and seeds, by
    Student's t with the runs' variance, pooled over both sides, which are independent whatever their seeds are called:
    another recipe makes other draws of the same seed. Runs are not drawn with replacement: of two runs that finds half
    the variance, and covers 84 to 88 % where seeds matter. What a run does by chance to single speakers is counted at
    both levels, so that the interval is wide rather than narrow, and `p` large rather than small.
    With one run on each side this is `difference`; two and more on one side stand for the other, too.

    `others` are the runs of further recipes of the same comparison: what they tell of the variance between seeds is
    pooled in, as in an analysis of variance. Two seeds on each side alone leave two degrees of freedom, and an interval
    twice as wide as ten do. `untuned` marks a side that no training made: no seed moves it.
    """
    _refuse_unlike(ours, theirs, *others)
    sides, words = [np.stack([run.word_edits for run in runs]) for runs in (ours, theirs)], ours[0].words
    blocks = _blocks(speakers, len(words))
    gained = sides[0].mean(axis=0) - sides[1].mean(axis=0)
    wers = [side.sum(axis=1) / words.sum() for side in sides]
    rest = [np.array([_ratio(run.word_edits, words) for run in runs]) for runs in others]
    return Difference(
        delta=_ratio(gained, words),
        ci95=interval(
            gained, words, blocks, samples=samples, seed=seed, noise=_run_noise(wers, rest, samples, seed, untuned)
        ),
        p=_sign_flip_p(sides, blocks, noise=_run_noise(wers, rest, 10 * samples, seed, untuned) * words.sum()),
        speakers=int(blocks.max()) + 1,
        seeds=(len(ours), len(theirs)),
    )


def score_over_seeds(
    runs: Sequence[Edits],
    speakers: Sequence[str] | None = None,
    *,
    others: Sequence[Sequence[Edits]] = (),
    samples: int = 1_000,
    seed: int = 13,
) -> SeedsScore:
    """Mean WER of several runs of a recipe on the same utterances; interval and `others` as in `difference_over_seeds`.

    Two seeds alone leave one degree of freedom, and an interval that says nothing: give the comparison's other recipes.
    """
    _refuse_unlike(runs, *others)
    edits, words = np.stack([run.word_edits for run in runs]), runs[0].words
    blocks, wers = _blocks(speakers, len(words)), edits.sum(axis=1) / words.sum()
    rest = [np.array([_ratio(run.word_edits, words) for run in third]) for third in others]
    noise = _run_noise([wers], rest, samples, seed)
    return SeedsScore(
        wer=float(wers.mean()),
        ci95=_of_a_rate(interval(edits.mean(axis=0), words, blocks, samples=samples, seed=seed, noise=noise)),
        wers=tuple(wers.tolist()),
        speakers=int(blocks.max()) + 1,
    )


def _refuse_unlike(*sides: Sequence[Edits]) -> None:
    if not all(sides):
        raise LabError("systems are compared by at least one run of each, got none: score one first")
    first = sides[0][0]
    if not all(np.array_equal(run.words, first.words) for runs in sides for run in runs):
        raise LabError("systems are compared on the same references in the same order: these are different ones")


def _run_noise(
    sides: Sequence[np.ndarray],
    others: Sequence[np.ndarray],
    draws: int,
    seed: int,
    untuned: Sequence[bool] = (False, False),
) -> np.ndarray:
    """float [draws]: how far the difference of the sides' means (one side: its mean) may lie from that of all seeds.

    `sides` are the WER of each run, float [runs]; `others` tell of the variance alone. Zeros where nothing tells it:
    every recipe has one run.
    """
    moved = [wers for wers, fixed in zip(sides, untuned) if not fixed]
    told = [*moved, *others]
    freedom = sum(len(wers) - 1 for wers in told)
    if not freedom:
        return np.zeros(draws)
    variance = sum(((wers - wers.mean()) ** 2).sum() for wers in told) / freedom
    standard_error = math.sqrt(variance * sum(1 / len(wers) for wers in moved))
    return standard_error * np.random.default_rng([seed, 1]).standard_t(freedom, draws)  # not the speakers' stream


def _sign_flip_p(sides: Sequence[np.ndarray], blocks: np.ndarray, noise: np.ndarray) -> float:
    """Two-sided p that sum(signs * blocks' mean gains) + noise is as far from 0 as the sum itself.

    `sides` int64 [runs, n] edits; `noise` float [draws] in edits: as likely above 0 as below. The distribution over all
    signs comes of adding one block after another, exactly: the gains are whole numbers once they are multiplied.
    """
    scale = len(sides[0]) * len(sides[1])
    gained = sides[0].sum(axis=0) * len(sides[1]) - sides[1].sum(axis=0) * len(sides[0])
    gains = np.rint(np.bincount(blocks, weights=gained)).astype(np.int64)
    total, seen = int(np.abs(gains).sum()), abs(int(gains.sum()))
    chances = np.zeros(total + 1)  # of the sum of the gains with a plus, each with probability one half
    chances[0], reach = 1.0, 1
    for gain in np.abs(gains[gains != 0]):
        halves = chances[:reach] / 2
        chances[:reach] = halves
        chances[gain : gain + reach] += halves
        reach += gain
    at_least = np.append(chances[::-1].cumsum()[::-1], 0.0)
    noise = scale * np.concatenate([noise, -noise])
    place = np.ceil((seen - noise + total) / 2).clip(0, total + 1).astype(np.int64)
    return min(1.0, 2 * float(at_least[place].mean()))


def _t975(freedom: int) -> float:
    """97.5 % quantile of Student's t: a table, then Cornish and Fisher's expansion, good to 0.1 %."""
    table = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
    if freedom <= len(table):
        return table[freedom - 1]
    return _Z975 + (_Z975**3 + _Z975) / (4 * freedom) + (5 * _Z975**5 + 16 * _Z975**3 + 3 * _Z975) / (96 * freedom**2)


def _edits(reference: str, hypothesis: str) -> tuple[int, int, int, int, int, int]:
    import jiwer

    if not reference:
        raise LabError("a reference without a word cannot be scored: remove that row")
    words = jiwer.process_words(reference, hypothesis)
    chars = jiwer.process_characters(reference, hypothesis)
    return (
        words.substitutions,
        words.insertions,
        words.deletions,
        len(reference.split()),
        chars.substitutions + chars.insertions + chars.deletions,
        len(reference),
    )


def _form(sentence: str, normalised: bool) -> str:
    return text.normalise(sentence) if normalised else " ".join(sentence.split())


def _blocks(speakers: Sequence[str] | None, n: int) -> np.ndarray:
    """Block numbers: one per speaker; an utterance without a speaker is a block of its own."""
    if speakers is not None and len(speakers) != n:
        raise LabError(
            f"scoring needs one speaker per reference, got {n} references and {len(speakers)} speakers: "
            "name one for each, '' where unknown"
        )
    names = [name or f"\0{i}" for i, name in enumerate(speakers if speakers is not None else [""] * n)]
    return np.unique(names, return_inverse=True)[1]


def _of_a_rate(interval: tuple[float, float]) -> tuple[float, float]:
    """No error rate is below 0, however wide its interval."""
    return max(interval[0], 0.0), interval[1]


def _ratio(edits: np.ndarray, of: np.ndarray) -> float:
    return float(edits.sum() / of.sum())
