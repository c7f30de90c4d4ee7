"""Series of experiments: runs, exported tables, and claims that follow from the committed tables."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import filelock
import numpy as np
import pandas as pd
import pytest
from log_recorder import record_log
from typer.testing import CliRunner

from pipelines import recipes as pipelines_recipes
from pipelines.__main__ import app
from pipelines.experiments import figures
from pipelines.experiments.comparison import compare
from pipelines.experiments.series import claims as series_claims
from pipelines.experiments.series import run as series
from pipelines.experiments.series import table_files
from pipelines.experiments.series import tables as series_tables
from pipelines.features import pipeline as feature_pipeline
from pipelines.infra import manifest
from pipelines.infra.errors import LabError
from pipelines.recipes import runs as recipe_runs

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "experiments"
ABLATION = RESULTS / "ablation"
SMALL = {
    "source.kind": "planted",
    "source.train": 24,
    "source.validation": 4,
    "source.test": 8,
    "source.faults": {"label_swap": 0.25, "duplicate": 0.25, "leak": 0.17},
    "training.steps": 2,
    "training.eval_every": 2,
    "evaluation.max_new_tokens": 4,
}


@pytest.fixture(scope="module")
def small(toy_settings, tmp_path_factory):
    """Return `small(name, seed, settings)`, which creates a toy recipe on a small planted corpus."""

    def make(name: str, seed: int = 42, settings: dict | None = None):
        return toy_settings({**SMALL, "name": name, "training.seed": seed, **(settings or {})})

    return make


REPAIR = {"max_label_cer": 0.5, "label_errors": "repair", "label_model": "run:planted-raw", "leaks": "drop"}


@pytest.fixture(scope="module")
def done(small, tmp_path_factory, one_thread):
    """Run a series of two recipes with two seeds twice; return recipes, runs folder, and the log lines of each run."""
    runs = tmp_path_factory.mktemp("runs")
    recipes = [
        small(name, seed, settings)
        for seed in (42, 43)
        for name, settings in (
            ("planted-raw", {"curation.leaks": "ignore"}),
            ("planted-repaired", {f"curation.{name}": value for name, value in REPAIR.items()}),
        )
    ]
    first = record_log()
    series.run(recipes, runs=runs)
    again = record_log()
    series.run(recipes, runs=runs)
    return recipes, runs, first, again


def test_plan_orders_recipes_within_each_seed():
    planned = series.plan(["tour", "tour-lora"], [1, 2], {"training.steps": 3})
    assert [(r.name, r.training.seed) for r in planned] == [
        ("tour", 1),
        ("tour-lora", 1),
        ("tour", 2),
        ("tour-lora", 2),
    ]
    assert {r.training.steps for r in planned} == {3}


def test_second_series_run_reuses_all_reports(done):
    _recipes, runs, first, again = done
    assert len(first) == len(again) == 4
    assert first[0].startswith("[1/4] planted-raw, seed 42: WER ") and "min left" in first[0]
    assert all("existing report" in line for line in again) and not any("existing report" in line for line in first)
    assert len(list(runs.glob("*/train-*/model"))) == 4


def test_label_model_is_of_the_named_recipe_and_seed(done, small):
    _recipes, runs, *_ = done
    for seed in (42, 43):
        found = recipe_runs.newest_model_of_seed(runs / "planted-raw", seed)
        assert json.loads((found / "recipe.json").read_text("utf-8"))["training"]["seed"] == seed
        settings = {f"curation.{name}": value for name, value in REPAIR.items()}
        assert feature_pipeline.label_model(small("planted-repaired", seed, settings), runs).folder == found
    absent = small("planted-repaired", 44, {f"curation.{name}": value for name, value in REPAIR.items()})
    with pytest.raises(LabError, match=r"run --recipe planted-raw --set training.seed=44"):
        feature_pipeline.run(absent, runs=runs)


def test_ambiguous_label_model_is_refused(done, small, tmp_path):
    _recipes, runs, *_ = done
    for name in ("one", "other"):
        shutil.copytree(
            recipe_runs.newest_model_of_seed(runs / "planted-raw", 42).parent,
            tmp_path / "planted-raw" / f"train-{name}",
        )
    assert recipe_runs.newest_model_of_seed(tmp_path / "planted-raw", 42), "twice the same is no question"
    other = tmp_path / "planted-raw" / "train-other" / "model"
    told = json.loads((other / "recipe.json").read_text("utf-8"))
    told["training"]["learning_rate"] *= 2
    (other / "recipe.json").write_text(json.dumps(told))
    facts = {name: value for name, value in manifest.read(other).items() if name not in ("files", "kind")}
    manifest.seal(other, kind="model", **facts)
    with pytest.raises(LabError, match=r"train-one/model and .*train-other/model with other settings"):
        feature_pipeline.label_model(
            small("x", 42, {f"curation.{name}": value for name, value in REPAIR.items()}), tmp_path
        )


def test_failed_experiment_does_not_end_the_series(small, tmp_path):
    told = record_log()
    lacking = small("lacking", settings={"curation.max_label_cer": 0.5, "curation.label_model": "run:none"})
    result = series.run([lacking, lacking], runs=tmp_path)
    failed = result.failed
    assert result.reports == () and len(failed) == len(told) == 2
    assert "no finished run of none" in failed[0]


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), MemoryError(), RuntimeError("CUDA\nat ...")])
def test_machine_error_does_not_end_the_series(small, tmp_path, monkeypatch, fault):
    def broken(*args, **kwargs):
        raise fault

    monkeypatch.setattr(feature_pipeline, "run", broken)
    result = series.run([small("planted-raw", seed) for seed in (42, 43)], runs=tmp_path)
    failed = result.failed
    assert result.reports == () and len(failed) == 2
    assert all("\n" not in line and line.startswith("planted-raw, seed 4") for line in failed)
    monkeypatch.setattr(feature_pipeline, "run", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a fault of the program is to be seen
        series.run([small("planted-raw", 42)], runs=tmp_path)


def test_exported_tables_reproduce_the_scores(done, tmp_path):
    recipes, runs, *_ = done
    reports = series_tables.export(recipes, tmp_path, runs=runs).reports
    assert list(reports) == [f"{r.name}/{r.training.seed}" for r in recipes]
    table, costs = (pd.read_csv(tmp_path / name) for name in (table_files.UTTERANCES, table_files.RUNS))
    assert len(table) == 8 and len(costs) == 4
    for name, report in reports.items():
        edits = np.array([list(map(int, cell.split())) for cell in table[name]])
        assert edits.sum(axis=0).tolist() == [
            report.score.substitutions,
            report.score.insertions,
            report.score.deletions,
        ]
        assert table["words"].sum() == report.score.words
    assert (costs["model"] == [report.lineage["digest"] for report in reports.values()]).all()
    clips = [feature_pipeline.run(recipe, runs=runs).counts["train"] for recipe in recipes]
    assert costs["training_clips"].tolist() == clips
    assert clips[0] == 24 > clips[1], "leaks are dropped"
    assert costs["test_set"].nunique() == 1
    assert not any(str(path) in file.read_text("utf-8") for file in tmp_path.iterdir() for path in (runs, ROOT))


def test_filter_scores_are_exported_per_seed(done, tmp_path):
    recipes, runs, *_ = done
    series_tables.export(recipes, tmp_path, runs=runs)
    told = json.loads((tmp_path / series_tables.FILTERS).read_text("utf-8"))
    assert told.keys() == {"42", "43"}
    leaks = told["42"]["checks"]["planted-repaired"]["leaks"]
    assert (leaks["found"], leaks["planted"], leaks["both"], leaks["precision"]) == (3, 4, 3, 1)
    assert told["42"]["limit"] == 0.5
    at = next(entry for entry in told["42"]["label_errors"] if entry["limit"] == 0.5)
    repaired = told["42"]["repairs"]["planted-repaired"]["clips"]
    dropped = told["42"]["checks"]["planted-repaired"].get("label_errors", {"found": 0})["found"]
    assert at["found"] == repaired + dropped > 0


def test_claims_equal_the_comparison_of_the_runs(done, tmp_path):
    recipes, runs, *_ = done
    reports = series_tables.export(recipes, tmp_path, runs=runs).reports
    raw, repaired = series_claims.of_tables(tmp_path)
    both = [reports[f"planted-raw/{seed}"].score for seed in (42, 43)]
    assert raw["wer"] == pytest.approx(np.mean([score.wer for score in both]))
    assert (raw["seeds"], raw["n"], raw["speakers"], raw["against"]) == ([42, 43], 8, 8, {})
    baseline, other = compare.compare(["planted-raw", "planted-repaired"], runs=runs).findings
    told = repaired["against"]["planted-raw"]
    assert (told["delta"], told["ci95"], told["p"]) == (
        other.difference.delta,
        other.difference.ci95,
        other.difference.p,
    )
    assert told["p_holm"] == other.p_holm and raw["ci95"] == baseline.score.ci95


def test_series_figure_has_recipe_rows_and_seed_curves(done, tmp_path):
    recipes, runs, *_ = done
    series_tables.export(recipes, tmp_path, runs=runs)
    filters = json.loads((tmp_path / series_tables.FILTERS).read_text("utf-8"))
    left, right = figures.series_figure(series_claims.of_tables(tmp_path), "planted-raw", filters).axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["planted-repaired"]
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["model of seed 42", "model of seed 43"]
    assert len(right.texts) == 2, "the limit in use is marked on each curve"


def test_export_ignores_runs_with_other_settings(done, small, tmp_path):
    _recipes, runs, *_ = done
    other = small("planted-raw", 42, {"curation.leaks": "ignore", "training.learning_rate": 2e-3})
    assert series_tables.finished_reports([other], runs) == {}
    with pytest.raises(LabError, match="no finished experiment"):
        series_tables.export([other], tmp_path, runs=runs)


def test_derived_numbers_count_as_auto():
    derived = {"training.steps": 120, "training.eval_every": 12, "training.patience": 3, "training.warmup_steps": 12}
    derived["evaluation.max_new_tokens"] = 60
    own, trained = pipelines_recipes.load("own"), pipelines_recipes.load("own", derived)
    assert series_tables._is_trained_with(own, trained)
    assert not series_tables._is_trained_with(own, pipelines_recipes.load("own", derived | {"training.seed": 7}))
    assert not series_tables._is_trained_with(trained, pipelines_recipes.load("own", derived | {"training.steps": 121}))


def test_series_goes_on_from_tables_without_its_runs(done, tmp_path, monkeypatch):
    """Tables grow by each result; another machine skips what they hold, and adds the rest."""
    recipes, runs, *_ = done
    whole, grown = tmp_path / "whole", tmp_path / "grown"
    series_tables.export(recipes, whole, runs=runs)
    (grown / "unrelated").mkdir(parents=True)
    for recipe in recipes[:3]:
        series.run(
            [recipe], runs=runs, on_report=lambda recipe, report: series_tables.add(recipe, report, grown, runs=runs)
        )
    known = series_tables.names_in_tables(recipes, grown)
    assert known == {"planted-raw/42", "planted-repaired/42", "planted-raw/43"}
    pending = [series.name_of(recipe) for recipe in series.pending(recipes, known)]
    assert pending == ["planted-raw/43", "planted-repaired/43"], "the label model of the missing one is needed"
    everything = {*known, "planted-repaired/43"}
    monkeypatch.setattr(feature_pipeline, "run", lambda *args, **kwargs: pytest.fail("an experiment was run again"))
    result = series.run(recipes, runs=tmp_path / "empty", in_tables=everything)
    assert (result.reports, result.in_tables) == ((), 4) and str(result).endswith("4 in the tables already")
    series_tables.add(
        recipes[3], series_tables.finished_reports(recipes, runs)["planted-repaired/43"], grown, runs=runs
    )
    for name in (table_files.UTTERANCES, table_files.RUNS):
        assert (grown / name).read_bytes() == (whole / name).read_bytes()


def test_known_runs_that_others_need_are_run(small):
    teacher = small("teacher")
    student = small("student", settings={"distillation.teacher": "run:teacher", "distillation.decoder_layers": 1})
    part = {"name": "more", "kind": "unlabelled", "path": "x", "label_model": "run:labels"}
    parts = [{"name": "own", "kind": "tour", "gives": ["train", "validation", "test"]}, part]
    mixed, labels = small("mixed", settings={"source.kind": "mix", "source.parts": parts}), small("labels")
    every = [teacher, labels, student, mixed]
    for missing, expected in ((student, [teacher, student]), (mixed, [labels, mixed]), (labels, [labels])):
        known = {series.name_of(recipe) for recipe in every if recipe is not missing}
        assert series.pending(every, known) == expected


def test_known_runs_of_earlier_rounds_are_run_too(small):
    first = small("round0")
    second, third = (small(f"round{n}", settings={"curation.label_model": f"run:round{n - 1}"}) for n in (1, 2))
    assert series.pending([first, second, third], {"round0/42", "round1/42"}) == [first, second, third]


def test_export_keeps_results_of_another_machine(done, tmp_path):
    recipes, runs, *_ = done
    series_tables.export(recipes, tmp_path, runs=runs)
    whole = [(tmp_path / name).read_bytes() for name in (table_files.UTTERANCES, table_files.RUNS)]
    tables = series_tables.export(recipes, tmp_path, runs=tmp_path / "nothing")
    assert [claim["recipe"] for claim in tables.claims] == ["planted-raw", "planted-repaired"]
    assert [(tmp_path / name).read_bytes() for name in (table_files.UTTERANCES, table_files.RUNS)] == whole
    only = series_tables.export(recipes[::2], tmp_path, runs=tmp_path / "nothing")
    assert [claim["recipe"] for claim in only.claims] == ["planted-raw"], "what is not planned is not kept"


def test_tables_know_only_the_same_settings(done, small, tmp_path):
    recipes, runs, *_ = done
    series_tables.export(recipes, tmp_path, runs=runs)
    raw = {"curation.leaks": "ignore"}
    assert series_tables.names_in_tables([small("planted-raw", 42, raw | {"training.workers": 1})], tmp_path)
    for other in ({"training.learning_rate": 2e-3}, {"source.test": 9}, {"evaluation.max_new_tokens": 5}):
        assert not series_tables.names_in_tables([small("planted-raw", 42, raw | other)], tmp_path), other
    assert not series_tables.names_in_tables([small("planted-raw", 44, raw)], tmp_path)
    costs = pd.read_csv(tmp_path / table_files.RUNS).drop(columns="settings")
    costs.to_csv(tmp_path / table_files.RUNS, index=False)
    assert not series_tables.names_in_tables(recipes, tmp_path), "tables of older versions do not tell"


def test_tables_refuse_another_test_set(done, small, tmp_path):
    recipes, runs, *_ = done
    report = series_tables.finished_reports(recipes, runs)["planted-raw/42"]
    series_tables.add(recipes[0], report, tmp_path, runs=runs)
    before = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    other = dataclasses.replace(report, test_set="0" * 16)
    with pytest.raises(LabError, match=r"need one test_set: planted-raw/42 has .*another folder than"):
        series_tables.add(recipes[2], other, tmp_path, runs=runs)
    assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == before


def test_other_test_set_ends_a_series_before_training(done, small, tmp_path, monkeypatch):
    recipes, runs, *_ = done
    series_tables.export(recipes[:2], tmp_path / "tables", runs=runs)
    into_tables = series_tables.callbacks(tmp_path / "tables", runs)
    assert not series.run(recipes[:2], runs=runs, **into_tables).failed, "the same test set is accepted"
    monkeypatch.setattr(series.training_pipeline, "run", lambda *_, **__: pytest.fail("a model is trained"))
    others = [
        small(name, settings={"source.test": 9, "curation.leaks": "ignore"})
        for name in ("planted-more", "planted-clean")
    ]
    with pytest.raises(LabError, match=r"need one test_set: planted-repaired/42 has .*planted-more/42 has"):
        series.run(others, runs=tmp_path / "runs", **into_tables)


def test_tables_and_export_together_are_refused(tmp_path):
    result = CliRunner().invoke(app, ["experiments", "--tables", str(tmp_path), "--export", str(tmp_path)])
    assert isinstance(result.exception, LabError)
    assert "give --tables or --export, not both" in str(result.exception)
    assert not [*tmp_path.iterdir()]


def test_process_killed_between_both_tables_loses_one_result(done, tmp_path):
    recipes, runs, *_ = done
    series_tables.export(recipes[:2], tmp_path, runs=runs)
    costs = pd.read_csv(tmp_path / table_files.RUNS, dtype=str)
    costs[:1].to_csv(tmp_path / table_files.RUNS, index=False)
    assert series_tables.names_in_tables(recipes, tmp_path) == {"planted-raw/42"}
    report = series_tables.finished_reports(recipes, runs)["planted-raw/43"]
    series_tables.add(recipes[2], report, tmp_path, runs=runs)
    assert series_tables.names_in_tables(recipes, tmp_path) == {"planted-raw/42", "planted-raw/43"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (table_files.RUNS, b"", "runs.csv must have the columns recipe, seed"),
        (table_files.RUNS, b"\xff\xfe\x00", "runs.csv must have the columns"),
        (table_files.RUNS, b"recipe;seed\na;42\n", "separated by commas, got 'recipe;seed'"),
        (table_files.UTTERANCES, b'id,speaker,words\n"x', "utterances.csv must have the columns id, speaker, words"),
        (
            table_files.UTTERANCES,
            b"id,speaker,words,a/42\nx,,1,1 0 0\nx,,1,1 0 0\n",
            "one row per utterance, got two of",
        ),
        (
            table_files.UTTERANCES,
            b"id,speaker,words,a/42\nx,,1,1 0\n",
            "numbers of edits, got '1 0' in column a/42",
        ),
        (table_files.RUNS, None, "must hold runs.csv beside utterances.csv, which has 2 results"),
    ],
)
def test_damaged_table_gives_one_line(done, tmp_path, name, content, message):
    recipes, runs, *_ = done
    series_tables.export(recipes[:2], tmp_path, runs=runs)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(LabError, match=message) as error:
        series_tables.names_in_tables(recipes, tmp_path)
    assert "\n" not in str(error.value)


def test_tables_without_an_utterance_are_not_extended(done, tmp_path):
    recipes, runs, *_ = done
    series_tables.export(recipes[:1], tmp_path, runs=runs)
    path = tmp_path / table_files.UTTERANCES
    path.write_text("".join(path.read_text("utf-8").splitlines(keepends=True)[:-1]), "utf-8")
    report = series_tables.finished_reports(recipes, runs)["planted-raw/43"]
    with pytest.raises(LabError, match="must have the 8 utterances of the test set, got 7 rows"):
        series_tables.add(recipes[2], report, tmp_path, runs=runs)


def test_cells_that_look_like_numbers_or_nothing_stay(tmp_path):
    table = pd.DataFrame({"id": ["1", "2"], "speaker": ["007", "NA"], "words": ["1", "1"], "a/42": ["1 0 0"] * 2})
    costs = pd.DataFrame([{"recipe": "a", "seed": 42, "test_set": "1e5", "normaliser": "n", "python": "3.10"}])
    table_files.write(tmp_path, table, costs)
    table_files.write(tmp_path, *table_files.read(tmp_path))
    again, costs = table_files.read(tmp_path)
    assert again["speaker"].tolist() == ["007", "NA"]
    assert costs.loc[0, ["test_set", "python"]].tolist() == ["1e5", "3.10"]
    (claim,) = series_claims.of_tables(tmp_path)
    assert claim["speakers"] == 2


def test_tables_are_locked_while_a_result_is_added(done, tmp_path, monkeypatch):
    recipes, runs, *_ = done
    write, timeouts = table_files.write, []

    def write_while_another_waits(*tables):
        with pytest.raises(filelock.Timeout) as error, filelock.FileLock(tmp_path / ".tables.lock", timeout=0):
            pass
        timeouts.append(error.value)
        write(*tables)

    monkeypatch.setattr(table_files, "write", write_while_another_waits)
    report = series_tables.finished_reports(recipes, runs)["planted-raw/42"]
    series_tables.add(recipes[0], report, tmp_path, runs=runs)
    assert len(timeouts) == 1 and series_tables.names_in_tables(recipes, tmp_path) == {"planted-raw/42"}


def test_tables_refuse_a_rehearsal(small, tmp_path):
    with pytest.raises(LabError, match="make tables without it"):
        series_tables.names_in_tables([small("a", settings={"training.fast_dev_run": True})], tmp_path)


def test_headline_states_when_no_difference_is_shown():
    claim = {"wer": 0.25, "ci95": (0.2, 0.3), "n": 9, "speakers": 3, "seeds": [42, 43]}

    def against(ci95: tuple[float, float], p_holm: float) -> list[str]:
        return series_claims.headline(
            {**claim, "against": {"a": {"delta": -0.02, "ci95": ci95, "p": 0.01, "p_holm": p_holm}}}
        )

    assert against((-0.03, -0.01), 0.04) == [
        "WER 0.250 (95 % 0.200 to 0.300); normalised, 9 utterances, 3 speakers, 2 seeds.",
        "Against `a`: -0.020 (95 % -0.030 to -0.010, p = 0.01, corrected 0.04): better.",
    ]
    assert against((-0.03, 0.01), 0.04)[1].endswith("corrected 0.04): no difference shown.")
    assert against((-0.03, -0.01), 0.06)[1].endswith("corrected 0.06): no difference shown.")


def test_experiments_command_plans_and_rejects_bad_seeds():
    runner = CliRunner()
    told = runner.invoke(app, ["experiments", "--dry-run", "--json", "--seeds", "1,2", "--recipes", "planted-raw,tour"])
    assert json.loads(told.stdout)["experiments"] == [
        f"{name}, seed {seed}" for seed in (1, 2) for name in ("planted-raw", "tour")
    ]
    assert len(json.loads(runner.invoke(app, ["experiments", "--dry-run", "--json"]).stdout)["experiments"]) == 24
    once = runner.invoke(
        app, ["experiments", "--dry-run", "--json", "--seeds", "42, 42", "--recipes", "planted-raw, tour,tour"]
    )
    assert json.loads(once.stdout)["experiments"] == ["planted-raw, seed 42", "tour, seed 42"]
    refused = runner.invoke(app, ["experiments", "--dry-run", "--seeds", "one"])
    assert isinstance(refused.exception, LabError) and "whole numbers" in str(refused.exception)


def test_folder_stands_for_its_recipes_and_may_not_be_empty(tmp_path):
    planned = series.plan([str(ABLATION)], [42, 43, 44])
    assert len(planned) == 3 * len(list(ABLATION.glob("*.toml")))
    assert planned[0].name == "ablation-baseline", "the baseline is the first of the folder"
    with pytest.raises(LabError, match=r"has no recipe: expected files that end in \.toml"):
        series.plan([str(tmp_path)])


@pytest.mark.parametrize("folder", ["ablation", "precision"])
def test_recipes_of_a_committed_series_differ_in_one_setting(folder):
    first, *others = series.plan([str(RESULTS / folder)], [42])
    baseline = pipelines_recipes.load(RESULTS / folder / "baseline.toml")
    for recipe in {recipe.name: recipe for recipe in [first, *others]}.values():
        changed = pipelines_recipes.differences(baseline.settings(), recipe.settings())
        assert len(changed) == (0 if recipe.name == baseline.name else 2), changed  # the name, and a setting


def test_first_recipe_is_the_baseline_of_a_series_without_planted(done, tmp_path):
    recipes, runs, *_ = done
    folder = series_tables.export(recipes, tmp_path, runs=runs).folder
    table = pd.read_csv(folder / table_files.UTTERANCES).rename(columns=lambda name: name.replace("planted-", "my-"))
    table.to_csv(folder / table_files.UTTERANCES, index=False)
    first, second = series_claims.of_tables(folder)
    assert (first["against"], list(second["against"])) == ({}, ["my-raw"])


@pytest.mark.skipif(not (RESULTS / table_files.UTTERANCES).exists(), reason="no results are committed yet")
def test_recipe_comments_match_committed_results():
    claims = {claim["recipe"]: claim for claim in series_claims.of_tables(RESULTS)}
    assert claims.keys() <= set(pipelines_recipes.names())
    for name in (name for name in pipelines_recipes.names() if name.startswith("planted-")):
        opening = (pipelines_recipes.RECIPES / f"{name}.toml").read_text("utf-8").split("\n\nname = ")[0]
        assert ("(to be measured)" in opening) == (name not in claims), name
        for line in series_claims.headline(claims[name]) if name in claims else []:
            assert f"# {line}\n" in f"{opening}\n", name


@pytest.mark.parametrize(
    "folder", [path.parent for path in sorted(RESULTS.rglob(table_files.RUNS))], ids=lambda path: path.name
)
def test_committed_runs_agree_with_utterances(folder):
    costs, table = pd.read_csv(folder / table_files.RUNS), pd.read_csv(folder / table_files.UTTERANCES)
    assert costs["test_set"].nunique() == costs["normaliser"].nunique() == 1
    for row in costs.itertuples():
        edits = np.array([list(map(int, cell.split())) for cell in table[f"{row.recipe}/{row.seed}"]])
        assert edits.sum() / table["words"].sum() == pytest.approx(row.wer, abs=1e-4)


def test_page_shows_the_figures_of_the_committed_ablation():
    page = (RESULTS.parent / "experiments.md").read_text("utf-8")
    claims = series_claims.of_tables(ABLATION)
    assert len(claims) == len(list(ABLATION.glob("*.toml")))
    for claim in claims:
        wer, *against = series_claims.headline(claim)
        assert f"| {wer.removeprefix('WER ').split('); ')[0].replace('95 % ', '')}) |" in page, claim["recipe"]
        for line in against:
            difference = re.search(r"[-+]\d[.]\d{3} \(95 % .*?(?=, p)", line)[0].replace("95 % ", "") + ")"
            assert difference in page.replace("**", ""), line
