"""Exercise 4: WER, normalisation, the bootstrap, a paired test, several comparisons, verdicts, power."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from pipelines.course.exercise import Exercise, Task, array, call, is_close, number, require
from pipelines.experiments.comparison import findings

FINDINGS = (
    {"name": "A", "delta_wer": -0.031, "interval": (-0.052, -0.010), "p_holm": 0.012},
    {"name": "B", "delta_wer": -0.045, "interval": (-0.101, 0.011), "p_holm": 0.240},
    {"name": "C", "delta_wer": 0.018, "interval": (0.006, 0.030), "p_holm": 0.030},
    {"name": "D", "delta_wer": -0.012, "interval": (-0.023, -0.001), "p_holm": 0.110},
)
"""Four comparisons with a baseline: the notebook's last task shows them."""
_VERDICTS = {"A": "better", "B": "not shown", "C": "worse", "D": "not shown"}


def check_wer(wer: Any) -> None:
    """Check the word error rate of one sentence."""
    for reference, hypothesis, expected in (
        ("vi ses i morgon", "vi ses på morgon", 0.25),
        ("vi ses i morgon", "vi ses i", 0.25),
        ("vi ses i morgon", "nu vi ses i morgon", 0.25),
        ("ja", "ja det är det", 3.0),
        ("god natt", "", 1.0),
        ("a b c d e", "b c d e f", 0.4),
    ):
        result = number(wer, reference, hypothesis)
        pair = f"{reference!r} against {hypothesis!r}"
        right, n = is_close(result, expected), len(reference.split())
        words = itertools.zip_longest(reference.split(), hypothesis.split())
        by_position = sum(one != other for one, other in words) / n
        require(
            right or not is_close(result, by_position),
            f"{pair}: {result:.2f} compares word by word, so that one missing word makes all later ones wrong. "
            "Find the smallest number of edits.",
        )
        require(
            right or not is_close(result * max(1, len(hypothesis.split())), expected * n),
            f"{pair}: divide by the words of the reference, not of the hypothesis.",
        )
        require(right or result != 1.0 or expected < 1, f"{pair}: a WER can exceed 1. Do not limit it.")
        require(right, f"{pair}: expected {expected:.2f}, got {result:.2f}.")


def check_corpus_wer(corpus_wer: Any) -> None:
    """Check the WER of a corpus: all errors by all words."""
    references = ["ja", "vi ses i morgon vid fem", "hon kom hem"]
    hypotheses = ["nej", "vi ses i morgon vid fem", "hon kom"]
    expected = 2 / 10
    result = number(corpus_wer, list(zip(references, hypotheses, strict=True)))
    require(
        not is_close(result, (1 + 0 + 1 / 3) / 3),
        "This is the mean of the sentences' WERs: the one-word sentence counts as much as the long one. Divide all "
        "errors by all words.",
    )
    require(is_close(result, expected), f"Expected {expected:.3f}, got {result:.3f}.")


def check_normalise(normalise: Any) -> None:
    """Check the normalisation before scoring."""
    for text, expected in (
        ("Hej, Åsa!", "hej åsa"),
        ("  Kan   du  höra mig? ", "kan du höra mig"),
        ("ÄR DET SÅ?", "är det så"),
    ):
        result = call(normalise, text)
        require(isinstance(result, str), f"Return a text, got {type(result).__name__}.")
        require(
            not set("åäö") & set(expected) or set("åäö") & set(result.lower()),
            f"{text!r} became {result!r}: å, ä and ö are separate letters. Whisper's basic normaliser removes "
            "their dots, which makes Swedish scores too good.",
        )
        require(result == result.lower(), f"{result!r} has capital letters.")
        require("  " not in result and result == result.strip(), f"{result!r} has spaces too many.")
        require(result == expected, f"Expected {expected!r} for {text!r}, got {result!r}.")


def check_bootstrap(bootstrap_interval: Any) -> None:
    """Check the interval of a WER over speakers."""
    random = np.random.default_rng(8)
    speakers = np.repeat(np.arange(8), 20)
    rates = np.array([0.05, 0.1, 0.15, 0.2, 0.3, 0.35, 0.45, 0.6])
    words = random.integers(4, 9, size=160)
    errors = random.binomial(words, rates[speakers])
    by_speaker = [(errors[speakers == n].sum(), words[speakers == n].sum()) for n in range(8)]
    expected = _percentiles(np.array(by_speaker), random)
    over_clips = _percentiles(np.stack([errors, words], axis=1), random)
    result = array(bootstrap_interval, (2,), errors, words, speakers)
    require(result[0] < result[1], "The first number is the lower end.")
    require(
        not is_close(result, over_clips, 0.02),
        f"[{result[0]:.3f}, {result[1]:.3f}] resamples clips: it says how the figure changes with other sentences by "
        "the same eight people. Draw whole speakers.",
    )
    require(
        is_close(result, expected, 0.03),
        f"Expected about [{expected[0]:.3f}, {expected[1]:.3f}], got [{result[0]:.3f}, {result[1]:.3f}]. Draw as many "
        "speakers as there are, with replacement, at least 1,000 times; take the 2.5th and 97.5th percentile.",
    )


def _percentiles(pairs: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return the 95 % bootstrap interval of sum(errors) / sum(words) over the rows of (errors, words)."""
    draws = pairs[random.integers(0, len(pairs), size=(20_000, len(pairs)))].sum(axis=1)
    return np.percentile(draws[:, 0] / draws[:, 1], [2.5, 97.5])


def check_sign_flips(sign_flip_p: Any) -> None:
    """Check the exact paired test over speakers."""
    # multiples of 1/64, whose sums are exact in any order: equally large sums compare as equal
    for counts in ([-8, -4, -1, -3, -6], [3, -2, 5, -1], [12, 6, -18, 3, 1]):
        differences = [count / 64 for count in counts]
        signs = np.array(list(itertools.product([1, -1], repeat=len(differences))))
        sums = signs @ np.array(differences)
        expected = float((np.abs(sums) >= abs(sum(differences))).mean())
        one_sided = float((sums <= sum(differences)).mean())
        result = number(sign_flip_p, differences)
        right = is_close(result, expected)
        require(
            right or not is_close(result, one_sided),
            "This is one-sided. Before the experiment you did not know the direction: compare absolute values.",
        )
        require(right or result > 0, "p is never 0: the signs that were observed are one of the possible combinations.")
        require(right, f"Expected p = {expected:.4f} for {differences}, got {result:.4f}.")


def check_holm(holm: Any) -> None:
    """Check Holm's correction."""
    ps = [0.01, 0.04, 0.03, 0.5]
    expected = findings.holm(ps)
    result = array(holm, (len(ps),), ps).tolist()
    require(
        not is_close(result, np.minimum(1, np.array(ps) * len(ps))),
        "This is Bonferroni's correction: all are multiplied by the number of comparisons. Holm's multiplies the "
        "smallest by n, the next by n - 1, and so on.",
    )
    ordered = sorted(range(len(ps)), key=ps.__getitem__)
    require(
        all(result[one] <= result[other] + 1e-12 for one, other in itertools.pairwise(ordered)),
        f"A larger p became smaller than a smaller one: {result}. Each is at least as large as the one before it.",
    )
    require(max(result) <= 1, "A p-value is at most 1.")
    require(is_close(result, expected), f"Expected {[round(p, 4) for p in expected]}, got {result}.")


def check_verdicts(verdicts: Any) -> None:
    """Check what may be concluded from FINDINGS."""
    require(isinstance(verdicts, dict), "Expected a dictionary: name to 'better', 'worse' or 'not shown'.")
    names = sorted(_VERDICTS)
    require(sorted(verdicts) == names, f"Expected a verdict for each of {names}, got {sorted(verdicts, key=str)}.")
    known = ("better", "worse", "not shown")
    odd = [verdict for verdict in verdicts.values() if verdict not in known]
    require(not odd, f"Expected 'better', 'worse' or 'not shown' for each, got {odd[:1]}.")
    require(
        verdicts["B"] == "not shown",
        "B has the largest difference, but its interval contains 0: a large difference is not a certain one.",
    )
    require(
        verdicts["D"] == "not shown",
        "D's interval lies below 0, but four comparisons were made, and corrected for that its p-value is above 0.05.",
    )
    require(verdicts["C"] == "worse", "C: ΔWER is above 0, and the whole interval is. More errors are worse.")
    require(verdicts == _VERDICTS, f"A: expected {_VERDICTS['A']!r}, got {verdicts['A']!r}.")


def check_speakers_needed(speakers_needed: Any) -> None:
    """Check the number of speakers for 80 % power."""
    for sd, difference in ((0.08, 0.03), (0.05, 0.05), (0.1, 0.02)):
        exact = ((1.959964 + 0.841621) * sd / difference) ** 2
        result = number(speakers_needed, sd, difference)
        require(
            result != np.ceil((1.959964 * sd / difference) ** 2),
            f"{result:g} speakers give a power of one half only: add 0.84, the quantile of 80 %, to 1.96.",
        )
        require(result.is_integer(), f"{result:g}: speakers come whole. Round up.")
        require(abs(result - np.ceil(exact)) <= 1, f"Expected {np.ceil(exact):.0f} speakers, got {result:g}.")


exercise = Exercise(
    [
        Task("Word error rate", check_wer),
        Task("The WER of a corpus", check_corpus_wer),
        Task("Normalise", check_normalise),
        Task("A bootstrap interval", check_bootstrap),
        Task("A paired test", check_sign_flips),
        Task("Several comparisons", check_holm),
        Task("What may you conclude?", check_verdicts),
        Task("How many speakers?", check_speakers_needed),
    ]
)
