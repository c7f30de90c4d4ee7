"""Confidence intervals and p-values for error rates: block bootstrap, sign-flip permutation test, Student's t.

A block is the set of utterances of one speaker. Utterances of one speaker are not independent, so blocks are the unit
of resampling. With one speaker, or if they are unknown, single clips are resampled instead, and `Units` says so.
tests/speech/test_intervals.py measures coverage and false alarms by simulation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.infra.errors import LabError
from pipelines.speech.text import same_speakers

MIN_SPEAKERS = 6
"""With fewer speakers nothing is concluded: all of five speakers improve by chance once in 16 times (p = 0.06)."""
SPEAKERS, CLIPS = "speakers", "clips"
_Z975 = 1.959964
"""97.5 % quantile of the normal distribution."""
_T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""97.5 % quantiles of Student's t with 1 to 10 degrees of freedom."""
_DRAWS_AT_ONCE = 1 << 20
"""Block numbers drawn at a time: 8 MB of int64, and twice as much for their edits and words."""


@dataclass(frozen=True)
class Units:
    """What an interval over utterances resamples, and so what it says something about."""

    over: str
    """SPEAKERS, or CLIPS if there is one speaker or they are unknown."""
    n: int
    """Utterances."""
    speakers: int
    """Speakers; 0 if they are unknown."""

    @classmethod
    def of(cls, score: Mapping[str, Any]) -> Units:
        """Return the units of a stored score (scoring.Score as a dictionary).

        Scores of older versions have no `over`, and counted each utterance of an unknown speaker as a speaker.
        """
        n, speakers = int(score.get("n") or 0), int(score.get("speakers") or 0)
        if "over" in score:
            return cls(score["over"], n, speakers)
        return cls(CLIPS, n, 0) if speakers >= n > 1 else cls(SPEAKERS, n, speakers)

    @property
    def enough(self) -> bool:
        """True if there are enough speakers for a conclusion about speakers."""
        return self.over == SPEAKERS and self.speakers >= MIN_SPEAKERS

    @property
    def who(self) -> str:
        """Return the speakers for people: `16 speakers`, `1 speaker`, `speakers unknown`."""
        return f"{self.speakers} speaker{'s' if self.speakers > 1 else ''}" if self.speakers else "speakers unknown"

    @property
    def suffix(self) -> str:
        """Text after an interval: nothing if it is over speakers, else ` over clips`."""
        return "" if self.over == SPEAKERS else " over clips"

    @property
    def caveat(self) -> str:
        """One sentence on what the intervals do not say; empty if there are enough speakers."""
        if self.enough:
            return ""
        if self.over == CLIPS:
            return f"{self.who}: intervals are over clips and say nothing about other speakers"
        return f"{self.who}: intervals over fewer than {MIN_SPEAKERS} speakers are unreliable"

    def interval(self, ends: Sequence[float] | None, form: str = "{:.3f}", to: str = " to ") -> str:
        """Format an interval, `0.310 to 0.490 over clips`; `no interval` if there is none, or only a point of one unit.

        `form` formats each end, `to` stands between them.
        """
        if ends is None or (self.over == SPEAKERS and self.speakers == 1):
            return "no interval"
        return to.join(form.format(end) for end in ends) + self.suffix


def group(speakers: Sequence[str | None] | None, n: int) -> tuple[np.ndarray, Units]:
    """Return the block number of each of `n` utterances, int64 [n], and what blocks are.

    `speakers` names the speaker of each utterance, in any spelling, '' or None where unknown. All utterances of unknown
    speakers form one block, because they may be by one person. With less than two known speakers every utterance is a
    block. Raises LabError for another number of speakers than utterances.
    """
    if speakers is not None and len(speakers) != n:
        raise LabError(
            f"scoring needs one speaker per reference, got {n} references and {len(speakers)} speakers: "
            "name one for each, '' where unknown"
        )
    names = same_speakers("" if name is None or name != name else str(name) for name in speakers or [""] * n)
    n_known = len({*names} - {""})
    if n_known < 2:
        return np.arange(n), Units(CLIPS, n, 0 if "" in names else n_known)
    return np.unique(names, return_inverse=True)[1], Units(SPEAKERS, n, n_known)


def ratio(edits: np.ndarray, total: np.ndarray) -> float:
    """Return sum(edits) / sum(total)."""
    return float(edits.sum() / total.sum())


def bootstrap_ci95(
    edits: np.ndarray,
    words: np.ndarray,
    blocks: np.ndarray,
    *,
    samples: int,
    seed: int,
    noise: np.ndarray | None = None,
) -> tuple[float, float] | None:
    """Return the 95 % interval of sum(edits) / sum(words), drawing whole blocks with replacement.

    `edits`, `words` [n]: per utterance. `blocks` int64 [n]: each utterance's block, numbered from 0. `noise` float
    [samples] is added to the resampled ratios: other sources of variance. None with one block, or with fewer than
    MIN_SPEAKERS blocks of equal ratios: chance made them equal, and an interval without width would be wrong.

    The distances of the percentiles from the ratio are multiplied by sqrt(k / (k - 1)) t / z for k blocks. Without it
    the intervals of 16 speakers contain the true value too seldom: the bootstrap divides by k instead of k - 1, and its
    spread is an estimate (Hesterberg 2015, "What Teachers Should Know About the Bootstrap", moves the levels of the
    percentiles instead, which is bounded by the most extreme of few speakers). Where a few speakers are far worse than
    all others, fewer intervals contain it: 92 % with 16 speakers, 88 % with 8.
    """
    count = int(blocks.max()) + 1
    block_edits = np.bincount(blocks, weights=edits, minlength=count)
    block_words = np.bincount(blocks, weights=words, minlength=count)
    if count < MIN_SPEAKERS and np.ptp(block_edits / block_words) < 1e-12:
        return None
    rng, chunk = np.random.default_rng(seed), max(1, _DRAWS_AT_ONCE // count)
    observed, deviations = ratio(edits, words), np.empty(samples)
    for start in range(0, samples, chunk):
        drawn = rng.integers(count, size=(min(chunk, samples - start), count))
        # at least one word: speakers without any, of clips without speech, may be all that is drawn
        resampled = block_edits[drawn].sum(axis=1) / np.maximum(block_words[drawn].sum(axis=1), 1)
        deviations[start : start + chunk] = resampled - observed
    deviations *= math.sqrt(count / (count - 1)) * _t975(count - 1) / _Z975
    low, high = observed + np.percentile(deviations + (0.0 if noise is None else noise), [2.5, 97.5])
    return float(low), float(high)


def seed_noise(
    sides: Sequence[np.ndarray],
    others: Sequence[np.ndarray],
    draws: int,
    seed: int,
    untuned: Sequence[bool] = (False, False),
) -> np.ndarray:
    """Draw deviations that training seeds cause in a difference of mean WERs (one side: in its mean): float [draws].

    `sides` are the WERs of each side's runs, float [runs]; a side marked in `untuned` does not depend on a seed.
    `others` are the WERs of further recipes, which only add to the estimate of the variance. Student's t with the
    variance pooled over all recipes; zeros if every recipe has one run, because nothing estimates the variance then.
    """
    seeded = [wers for wers, is_untuned in zip(sides, untuned) if not is_untuned]
    pooled = [*seeded, *others]
    degrees_of_freedom = sum(len(wers) - 1 for wers in pooled)
    if not degrees_of_freedom:
        return np.zeros(draws)
    variance = sum(((wers - wers.mean()) ** 2).sum() for wers in pooled) / degrees_of_freedom
    standard_error = math.sqrt(variance * sum(1 / len(wers) for wers in seeded))
    rng = np.random.default_rng([seed, 1])  # independent of the stream that draws blocks
    return standard_error * rng.standard_t(degrees_of_freedom, draws)


def sign_flip_p(sides: Sequence[np.ndarray], blocks: np.ndarray, noise: np.ndarray) -> float:
    """Return the two-sided p-value of the sign-flip test: the summed gain of one side over the other, block by block.

    `sides`: the edits of both sides, int64 [runs, n]. `noise` float [draws] in edits, symmetric about 0, is added under
    the null hypothesis. All 2^k assignments of signs to the k blocks are counted exactly (Pagano & Tritchler 1983): the
    distribution of the sum of the gains with a plus sign is built by adding one block after another. Gains of means are
    multiplied by the numbers of runs, which makes them integers.
    """
    scale = len(sides[0]) * len(sides[1])
    gained = sides[0].sum(axis=0) * len(sides[1]) - sides[1].sum(axis=0) * len(sides[0])
    gains = np.rint(np.bincount(blocks, weights=gained)).astype(np.int64)
    total, observed = int(np.abs(gains).sum()), abs(int(gains.sum()))
    probabilities = np.zeros(total + 1)  # index: the sum of the gains with a plus sign
    probabilities[0], reach = 1.0, 1
    for gain in np.abs(gains[gains != 0]):
        halves = probabilities[:reach] / 2
        probabilities[:reach] = halves
        probabilities[gain : gain + reach] += halves
        reach += gain
    at_least = np.append(probabilities[::-1].cumsum()[::-1], 0.0)
    noise = scale * np.concatenate([noise, -noise])
    thresholds = np.ceil((observed - noise + total) / 2).clip(0, total + 1).astype(np.int64)
    return min(1.0, 2 * float(at_least[thresholds].mean()))


def _t975(degrees_of_freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t: a table, then Cornish and Fisher's expansion, exact to 0.1 %."""
    if degrees_of_freedom <= len(_T975):
        return _T975[degrees_of_freedom - 1]
    first_order = (_Z975**3 + _Z975) / (4 * degrees_of_freedom)
    return _Z975 + first_order + (5 * _Z975**5 + 16 * _Z975**3 + 3 * _Z975) / (96 * degrees_of_freedom**2)
