"""How many training seeds and test speakers an experiment needs to detect a difference in WER.

    python -m pipelines.experiments.comparison.power --seeds 24 --speakers 112

The difference between two recipes has two independent sources of chance: the seeds of both, and the speakers of the
test set, on whom the recipes differ by different amounts. Its variance is

    seed_sd ** 2 / seeds + seed_sd ** 2 / baseline_seeds + speaker_sd ** 2 / speakers

and a true difference is detected with 80 % power if it is 1.96 + 0.84 standard errors. This is an approximation for
large samples: the variances are taken as known.
"""

from __future__ import annotations

import argparse
from statistics import NormalDist

SEED_SD = 0.0275
"""Standard deviation of WER between seeds: pooled over twelve recipes (docs/experiments), 12 degrees of freedom."""
SPEAKER_SD = 0.075
"""Standard deviation over speakers of the difference between two recipes, mean of two seeds each (docs/experiments:
0.053 to 0.076 for eight of eleven recipes)."""


def detectable(
    seeds: int,
    speakers: int,
    *,
    baseline_seeds: int = 0,
    power: float = 0.8,
    alpha: float = 0.05,
    seed_sd: float = SEED_SD,
    speaker_sd: float = SPEAKER_SD,
) -> float:
    """Return the smallest true difference in WER that `seeds` runs per recipe and `speakers` detect with `power`.

    `baseline_seeds` are the runs of the baseline; 0: as many as `seeds`.
    """
    error = (seed_sd**2 / seeds + seed_sd**2 / (baseline_seeds or seeds) + speaker_sd**2 / speakers) ** 0.5
    normal = NormalDist()
    return (normal.inv_cdf(1 - alpha / 2) + normal.inv_cdf(power)) * error


def main(arguments: list[str] | None = None) -> None:
    """Print the difference that can be detected."""
    parser = argparse.ArgumentParser(description="Print the WER difference that is detected four times in five.")
    parser.add_argument("--seeds", type=int, required=True, help="training seeds per recipe")
    parser.add_argument("--baseline-seeds", type=int, default=0, help="training seeds of the baseline, if different")
    parser.add_argument("--speakers", type=int, required=True, help="speakers of the test set")
    options = parser.parse_args(arguments)
    if min(options.seeds, options.speakers) < 1 or options.baseline_seeds < 0:
        parser.error("--seeds and --speakers must be at least 1, --baseline-seeds at least 0")
    smallest = detectable(options.seeds, options.speakers, baseline_seeds=options.baseline_seeds)
    print(f"detectable difference in WER: {smallest:.3f}")


if __name__ == "__main__":
    main()
