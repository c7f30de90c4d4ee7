"""experiments.csv: one row per tuned model and test set, also with concurrent writers and torn rows."""

from __future__ import annotations

import csv
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import sample_reports

from pipelines import __main__ as cli
from pipelines.experiments import pipeline as experiment_pipeline
from pipelines.experiments import run_log
from pipelines.infra.errors import LabError
from pipelines.training import pipeline as training_pipeline

ROOT = Path(__file__).parents[2]


def table(runs: Path) -> list[list[str]]:
    """Return the rows of the file as lists of cells."""
    with open(runs / "experiments.csv", newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_row_records_training_data_and_score(tmp_path: Path):
    report = sample_reports.report(tmp_path, "raw", settings={"training.steps": 77})
    assert run_log.add(report, tmp_path)
    (row,) = run_log.read(tmp_path)
    assert tuple(row) == run_log.COLUMNS == tuple(table(tmp_path)[0])
    assert list(row.values()) == table(tmp_path)[1]
    told = report.lineage
    assert (row["recipe"], row["cache"], row["model"], row["seed"]) == ("raw", "cache0000001", told["digest"], "42")
    assert (row["test_set"], row["normaliser"], row["n"]) == (report.test_set, report.normaliser, "60")
    assert float(row["wer"]) == pytest.approx(2 / 12, abs=1e-6)
    assert float(row["low"]) <= float(row["wer"]) <= float(row["high"])
    assert (row["machine"], row["training_seconds"], row["steps"]) == ("2 CPU threads", "142.5", "77")
    assert row["report"] == f"raw/reports/{report.folder.name}"
    assert re.fullmatch(r"[0-9a-f]{12}", row["code"]) and re.fullmatch(r"[0-9a-f]{12}", row["recipe_digest"])


def test_recipe_digest_is_equal_for_all_seeds(tmp_path: Path):
    for seed in (1, 2):
        run_log.add(sample_reports.report(tmp_path, "raw", seed=seed), tmp_path)
    run_log.add(sample_reports.report(tmp_path, "raw", settings={"training.steps": 7}), tmp_path)
    first, second, other = (row["recipe_digest"] for row in run_log.read(tmp_path))
    assert first == second != other


def test_model_has_one_row_per_test_set(tmp_path: Path):
    report = sample_reports.report(tmp_path, "raw")
    assert [run_log.add(report, tmp_path) for _ in range(3)] == [True, False, False]
    assert run_log.add(dataclasses.replace(report, test_set="another"), tmp_path)
    assert run_log.add(dataclasses.replace(report, normaliser="99"), tmp_path)
    assert [row["test_set"] for row in run_log.read(tmp_path)] == [report.test_set, "another", report.test_set]


def test_only_test_scores_of_tuned_models_are_logged(tmp_path: Path):
    for report in (
        sample_reports.report(tmp_path, "raw", tuned=False),
        sample_reports.report(tmp_path, "raw", split="validation"),
        sample_reports.report(tmp_path, "raw", settings={"training.fast_dev_run": True}),
        dataclasses.replace(sample_reports.report(tmp_path, "raw"), test_set=""),
    ):
        assert not run_log.add(report, tmp_path)
    assert not (tmp_path / "experiments.csv").exists()


@pytest.mark.parametrize("keep", [0, 1, 20, -1, -2, -30])
def test_crash_loses_no_complete_row(tmp_path: Path, keep: int):
    """Cut the last line after `length` characters, or that many before its end if negative."""
    first, second = (sample_reports.report(tmp_path, "raw", seed=seed) for seed in (1, 2))
    for report in (first, second):
        run_log.add(report, tmp_path)
    path = tmp_path / "experiments.csv"
    head, last = path.read_bytes()[:-1].rsplit(b"\n", 1)
    path.write_bytes(head + b"\n" + (last + b"\n")[:keep])
    whole = keep == -1  # the line's end alone is missing
    assert [row["seed"] for row in run_log.read(tmp_path)] == ["1", "2"][: 1 + whole]
    assert run_log.add(second, tmp_path) is not whole
    run_log.add(sample_reports.report(tmp_path, "raw", seed=3), tmp_path)
    assert [row["seed"] for row in run_log.read(tmp_path)] == ["1", "2", "3"]
    assert [len(row) for row in table(tmp_path)] == [len(run_log.COLUMNS)] * 4


@pytest.mark.parametrize("length", [0, 5, -1])
def test_torn_header_is_rewritten(tmp_path: Path, length: int):
    (tmp_path / "experiments.csv").write_text((",".join(run_log.COLUMNS) + "\n")[:length])
    assert run_log.read(tmp_path) == []
    assert run_log.add(sample_reports.report(tmp_path, "raw"), tmp_path)
    assert len(table(tmp_path)) == 2


def test_file_with_other_columns_is_not_changed(tmp_path: Path):
    (tmp_path / "experiments.csv").write_text("mine,own\n1,2\n")
    with pytest.raises(LabError, match="move it away"):
        run_log.add(sample_reports.report(tmp_path, "raw"), tmp_path)
    assert (tmp_path / "experiments.csv").read_text() == "mine,own\n1,2\n"


@pytest.mark.slow
def test_concurrent_adders_write_each_row_once(tmp_path: Path):
    """Each process adds all ten rows in a different order."""
    for seed in range(10):
        sample_reports.report(tmp_path, "raw", seed=seed)
    code = (
        "import random, sys; from pathlib import Path; from pipelines.experiments import evaluation, run_log\n"
        "runs = Path(sys.argv[1]); folders = sorted((runs / 'raw' / 'reports').iterdir())\n"
        "random.Random(sys.argv[2]).shuffle(folders)\n"
        "sys.stdin.read(1)\n"
        "print(sum(run_log.add(evaluation.read_report(folder), runs) for folder in folders))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    adders = [subprocess.Popen([*command, str(number)], **pipes) for number in range(3)]
    added = [int(adder.communicate("x")[0]) for adder in adders]
    assert sum(added) == 10
    assert sorted(int(row["seed"]) for row in run_log.read(tmp_path)) == list(range(10))


def test_test_score_adds_one_row_repeated_call_none(
    toy_settings, toy_cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    runs, told = tmp_path / "runs", {"training.steps": 1, "training.eval_every": 1, "evaluation.max_new_tokens": 3}
    recipe = toy_settings(told)
    model = training_pipeline.run(recipe, toy_cache, runs=runs)
    experiment_pipeline.evaluate(recipe, toy_cache, recipe.model.base, runs=runs)
    experiment_pipeline.evaluate(recipe, toy_cache, model.uri, "validation", runs=runs)
    assert run_log.read(runs) == []
    report = experiment_pipeline.evaluate(recipe, toy_cache, model.uri, runs=runs)
    (row,) = run_log.read(runs)
    assert (row["recipe"], row["model"], row["cache"]) == ("toy", model.digest, toy_cache.digest)
    assert (row["wer"], row["steps"]) == (f"{report.score.wer:.6f}", "1")
    before = {path: path.stat().st_mtime_ns for path in runs.glob("*experiments*")}
    experiment_pipeline.evaluate(recipe, toy_cache, model.uri, runs=runs)
    assert {path: path.stat().st_mtime_ns for path in runs.glob("*experiments*")} == before


def test_compare_without_names_lists_the_log(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    def listed() -> list[str]:
        monkeypatch.setattr(sys, "argv", ["pipelines", "compare", "--runs", str(tmp_path)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        return capsys.readouterr().out.splitlines()

    assert listed()[0] == "no tuned model was scored on a test set yet"
    for name in ("raw", "filtered"):
        run_log.add(sample_reports.report(tmp_path, name), tmp_path)
    header, *rows, last = listed()
    assert header.split()[:3] == ["when", "recipe", "seed"]
    assert [row.split()[1] for row in rows] == ["raw", "filtered"]
    assert last == f"Next: python -m pipelines compare raw filtered --runs {tmp_path}"
