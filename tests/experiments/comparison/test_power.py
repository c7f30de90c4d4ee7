from __future__ import annotations

import numpy as np
import pytest

from pipelines.experiments.comparison import power


def test_planned_study_detects_three_hundredths_and_the_first_did_not():
    assert power.detectable(24, 112) < 0.03
    assert power.detectable(2, 32) > 0.08
    assert power.detectable(8, 112, baseline_seeds=24) == pytest.approx(0.037, abs=5e-4)
    assert power.detectable(1_000_000, 32) > 0.03, "no number of seeds replaces speakers"


def test_detected_share_in_a_simulation_is_the_power():
    rng, seeds, speakers = np.random.default_rng(1), 24, 112
    true = power.detectable(seeds, speakers)
    seed = rng.normal(0, power.SEED_SD, (4_000, 2, seeds)).mean(axis=2)
    speaker = rng.normal(true, power.SPEAKER_SD, (4_000, speakers)).mean(axis=1)
    error = (2 * power.SEED_SD**2 / seeds + power.SPEAKER_SD**2 / speakers) ** 0.5
    assert np.mean(np.abs(seed[:, 0] - seed[:, 1] + speaker) > 1.96 * error) == pytest.approx(0.8, abs=0.02)


def test_command_prints_the_difference(capsys):
    power.main(["--seeds", "24", "--speakers", "112"])
    assert capsys.readouterr().out == "detectable difference in WER: 0.030\n"
