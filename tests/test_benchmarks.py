"""Benchmarks run and say what they promise to say; their figures need a quiet machine and more clips than this."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_feature_benchmark_ends_with_its_figures(tiny_folder, tmp_path):
    command = [sys.executable, "benchmarks/features.py", "--smoke", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert {*result} == {
        "speedup", "floor_fraction", "bytes_ratio_f32", "bytes_ratio_f16", "reads_per_s", "rss_growth", "rate_growth"
    }  # fmt: skip
    assert all(value > 0 for value in result.values())
    assert result["bytes_ratio_f32"] < 1 / 6
    assert list(tmp_path.iterdir()) == []


def test_the_window_benchmark_scores_clips_and_windows(toy_cache, toy_model):
    command = [sys.executable, "benchmarks/windows.py", "--cache", toy_cache.uri, str(toy_model)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    (found,) = json.loads(done.stdout.splitlines()[-1]).values()
    assert found["clips"]["n"] == len(toy_cache.split("test")) >= found["windows"]["n"]
    assert found["clips"]["words"] == found["windows"]["words"]
    assert found["clips"]["speakers"] == found["windows"]["speakers"]


def test_the_training_benchmark_ends_with_its_figures(toy_model, tmp_path):
    command = [
        sys.executable,
        "benchmarks/training.py",
        "--smoke",
        "--model",
        str(toy_model),
        "--folder",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert {*result} == {
        "speedup", "speedup_4s", "eval_speedup", "memory_ratio", "device", "wer_classic", "wer_ours", "delta_wer_ci95"
    }  # fmt: skip
    low, high = result["delta_wer_ci95"]
    assert low <= result["wer_ours"] - result["wer_classic"] <= high
    assert min(result["speedup"], result["speedup_4s"], result["eval_speedup"], result["memory_ratio"]) > 0
    assert list(tmp_path.iterdir()) == []
