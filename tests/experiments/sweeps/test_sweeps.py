"""Sweeps: proposals, promotions, interruptions, failures and results; and the documented training loop."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pandas as pd
import pytest
import torch
from log_recorder import record_log
from safetensors.torch import load_file

from pipelines import recipes
from pipelines.__main__ import app
from pipelines.experiments.sweeps import asha, executors, results, search_space, sweep, trial_run
from pipelines.experiments.sweeps.trials import Record, Trial
from pipelines.features import pipeline as feature_pipeline
from pipelines.features.cache import FeatureCache
from pipelines.infra.errors import LabError, Unfinished
from pipelines.recipes import base_settings
from pipelines.training import components, trainer, validation
from pipelines.training import loop as training_loop
from pipelines.training import pipeline as training_pipeline
from pipelines.training import run as training_run
from pipelines.training.callbacks import interruptions
from pipelines.training.callbacks import progress as callbacks_progress
from pipelines.whisper import model as whisper_model

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "sweeps.md"
SPACE = {
    "search.space.training.learning_rate": {"kind": "loguniform", "low": 1e-4, "high": 1e-2},
    "search.space.training.warmup_steps": {"kind": "int", "low": 0, "high": 3},
    "search.space.training.scheduler": {"kind": "choice", "values": ["linear", "cosine", "constant"]},
}
SEARCH = {**SPACE, "search.trials": 3, "search.reduction": 2, "evaluation.max_new_tokens": 3}
SEARCH |= {"training.steps": 8}  # rungs at 4 and 8
VALIDATOR = validation.validator

pytestmark = pytest.mark.usefixtures("one_thread")


def by_loss(*args):
    """Use the loss as WER: the toy's WER is constant, so all trials would be equal."""
    validate = VALIDATOR(*args)
    return lambda model: (lambda found: {**found, "wer": found["loss"]})(validate(model))


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Cache what every part of a trial would compute again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whisper_model, "load_processor", functools.cache(whisper_model.load_processor))
        yield


@pytest.fixture(autouse=True)
def looks(monkeypatch):
    monkeypatch.setattr(training_loop, "validator", by_loss)
    monkeypatch.setattr(results, "write_figure", lambda *args: None)  # the first sweep has drawn one


def told(trials: list[Trial]) -> list[dict]:
    """Return trials without their times."""
    return [{**dataclasses.asdict(trial), "seconds": 0} for trial in trials]


def noted(folder: Path) -> list[dict]:
    return told(list(Record(folder).trials.values()))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Return a runs folder in which the toy's features are built once."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def fresh_runs(runs, tmp_path) -> Path:
    """Return a separate runs folder with a copy of the toy's features."""
    if (runs / "features").exists():
        shutil.copytree(runs / "features", tmp_path / "runs" / "features")
    return tmp_path / "runs"


@pytest.fixture(scope="module")
def whole(toy_settings, runs, one_thread):
    """Run a sweep without interruption; return recipe, result, log lines and the splits that were read."""
    told = record_log()
    read: set[str] = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_loop, "validator", by_loss)
        recipe = toy_settings(SEARCH)
        feature_pipeline.run(recipe, runs=runs)
        for name in ("log_mel", "labels"):
            patch.setattr(FeatureCache, name, spied(getattr(FeatureCache, name), read))
        made = sweep.run(recipe, runs=runs)
    return recipe, made, told, read


def spied(method, read: set[str]):
    def spy(cache: FeatureCache, row: int, *args):
        read.add(cache.rows["split"].iloc[row])
        return method(cache, row, *args)

    return spy


# --- the recipe's search ----------------------------------------------------------------------------------------------


def test_search_settings_are_not_part_of_run_identity(toy_settings, toy_cache, toy_model):
    plain, searching = toy_settings(), toy_settings(SPACE | {"search.seed": 3})
    assert searching.search.space.keys() == {"training.learning_rate", "training.warmup_steps", "training.scheduler"}
    assert plain.settings() == searching.settings()
    base = whisper_model.resolve(str(toy_model))
    assert training_run.run_identity(plain, toy_cache, base) == training_run.run_identity(searching, toy_cache, base)


def test_new_optimizer_settings_keep_old_run_names(toy_settings, toy_cache, toy_model):
    base = whisper_model.resolve(str(toy_model))
    plain = training_run.run_identity(toy_settings(), toy_cache, base)
    others = {"training.scheduler": "cosine", "training.optimizer": "sgd"}
    others |= {"training.beta1": 0.8, "training.beta2": 0.98}
    assert not others.keys() & plain.keys()
    for name, value in others.items():
        assert training_run.run_identity(toy_settings({name: value}), toy_cache, base) == {**plain, name: value}


@pytest.mark.parametrize("name", recipes.names())
def test_recipe_survives_toml_round_trip(name):
    recipe = recipes.load(
        name, SPACE | {"search.trials": 5, "source.sentences": 'a "b" \\ å\n', "model.dropout": 1e-05}
    )
    text = recipes.as_toml(recipe, "two\nlines")
    assert text.startswith("# two\n# lines\n")
    assert recipes.resolve(tomllib.loads(text), {}) == recipe
    assert "[search" not in recipes.as_toml(recipes.load("tour"))


def test_mix_parts_are_written_as_toml():
    parts = [{"name": "a", "kind": "tour", "weight": 0.5}, {"name": "b", "kind": "hub", "path": "o/n", "weight": 1}]
    recipe = recipes.load("tour", {"source.kind": "mix", "source.parts": parts})
    assert recipes.resolve(tomllib.loads(recipes.as_toml(recipe)), {}) == recipe


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ({"search.trails": 4}, "did you mean 'search.trials'"),
        ({"search.space.training.learning_rat.low": 1}, "unknown setting"),
        ({"search.space.evaluation.max_new_tokens": {"kind": "int", "low": 1, "high": 2}}, "unknown setting"),
        ({"search.space.model.dropout": {"kind": "uniform", "low": 0.1}}, "needs `low` below `high`"),
        ({"search.space.model.dropout": {"kind": "uniform", "low": 0.2, "high": 0.1}}, "needs `low` below `high`"),
        ({"search.space.model.dropout": {"kind": "loguniform", "low": 0, "high": 0.1}}, "above 0"),
        ({"search.space.training.steps": {"kind": "int", "low": 0.5, "high": 3}}, "whole numbers"),
        ({"search.space.model.adapter": {"kind": "choice", "values": ["lora"]}}, "two or more"),
        ({"search.space.model.adapter": {"kind": "coin"}}, "'choice'"),
    ],
)
def test_invalid_search_raises_one_line_error(override, why):
    with pytest.raises(LabError, match=re.escape(why)) as error:
        recipes.load("tour", override)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ({}, "has no search space"),
        ({"search.space.training.batch_size": {"kind": "uniform", "low": 2, "high": 8}}, ": 3.882"),
        ({"search.space.model.dropout": {"kind": "uniform", "low": 0.1, "high": 2}}, ": 2.0"),
        ({"search.space.training.steps": {"kind": "int", "low": 2, "high": 8}}, "no common rungs"),
        (SPACE | {"training.fast_dev_run": True}, "means nothing"),
        ({"search.space.training.workers": {"kind": "int", "low": 0, "high": 1}}, "the same weights"),
    ],
)
def test_impossible_search_is_refused_before_writing(override, why, tmp_path):
    with pytest.raises(LabError, match=re.escape(why)):
        sweep.run(recipes.load("tour", override), runs=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_trials_with_teacher_start_from_teacher(toy_settings, tmp_path):
    recipe = toy_settings({**SPACE, "name": "student", "distillation.teacher": "run:tour"})
    jobs = sweep._Jobs(recipe, "student", tmp_path)
    with pytest.raises(LabError, match="no finished run of it on this cache"):
        jobs.of(Trial(1, {}, 2))


# --- the space --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_proposals_depend_only_on_seed_and_record(toy_settings, sampler):
    if sampler == "tpe":
        pytest.importorskip("optuna")
    recipe = toy_settings(SPACE | {"search.sampler": sampler, "training.learning_rate": 1e-3})
    trials: list[Trial] = []
    for number in range(1, 31):
        settings = search_space.proposal(recipe, number, trials)
        assert settings == search_space.proposal(recipe, number, trials)
        assert settings not in [trial.settings for trial in trials]
        # the lower the learning rate, the better: what TPE is to find
        wer = settings["training.learning_rate"]
        trials.append(Trial(number, settings, 4, state="finished" if number % 2 else "paused", looks={4: wer}))
    assert trials[0].settings == {
        "training.learning_rate": 1e-3,
        "training.warmup_steps": 2,
        "training.scheduler": "linear",
    }, "the recipe's own values come first"
    rates = [trial.settings["training.learning_rate"] for trial in trials]
    assert 1e-4 <= min(rates) < 2e-4 and max(rates) <= 1e-2
    assert {trial.settings["training.warmup_steps"] for trial in trials} == {0, 1, 2, 3}
    assert {trial.settings["training.scheduler"] for trial in trials} == {"linear", "cosine", "constant"}
    late = sum(rate < 1e-3 for rate in rates[15:])
    assert late >= 12 if sampler == "tpe" else late < 12
    other = toy_settings(SPACE | {"search.sampler": sampler, "search.seed": 20})
    assert search_space.proposal(other, 2, trials[:1]) != trials[1].settings


def test_tpe_uses_diverged_trials(toy_settings):
    pytest.importorskip("optuna")
    recipe = toy_settings(SPACE | {"search.sampler": "tpe"})
    others = {"training.warmup_steps": 2, "training.scheduler": "linear"}
    rates = [1e-4 * 10 ** (2 * i / 19) for i in range(20)]
    states = ["diverged" if rate > 2e-3 else "finished" for rate in rates]
    # the higher the better, up to where all is lost
    trials = [
        Trial(number, {"training.learning_rate": rate, **others}, 4, state, {4: 1e-4 / rate})
        for number, (rate, state) in enumerate(zip(rates, states, strict=True), 1)
    ]
    drawn = [search_space.proposal(recipe, number, trials)["training.learning_rate"] for number in range(21, 51)]
    assert sum(rate > 2.5e-3 for rate in drawn) <= 5
    broken = [dataclasses.replace(trial, looks={}, state="failed") for trial in trials if trial.state == "diverged"]
    again = search_space.proposal(recipe, 21, [*(trial for trial in trials if trial.state == "finished"), *broken])
    assert again["training.learning_rate"] == drawn[0], "one that failed is held to be as bad"


def test_small_space_is_exhausted(toy_settings):
    few = {"search.space.training.scheduler": SPACE["search.space.training.scheduler"]}
    recipe, trials = toy_settings(few), []
    while settings := search_space.proposal(recipe, len(trials) + 1, trials):
        trials.append(Trial(len(trials) + 1, settings, 4))
    assert sorted(trial.settings["training.scheduler"] for trial in trials) == ["constant", "cosine", "linear"]


def test_missing_optuna_error_names_install_command(toy_settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(LabError, match=r"Run: pip install 'optuna>="):
        search_space.proposal(toy_settings(SPACE | {"search.sampler": "tpe"}), 2, [])


# --- successive halving -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("search", "expected"),
    [
        ({}, [10, 30, 60]),
        ({"search.reduction": 2}, [10, 20, 40, 60]),
        ({"search.reduction": 1}, [60]),
        ({"search.min_steps": 15}, [20, 50, 60]),
        ({"search.min_steps": 60}, [60]),
        ({"search.min_steps": 1, "search.reduction": 4}, [10, 20, 60]),
    ],
)
def test_rungs_are_validation_steps(search, expected):
    sizes = {"training.steps": 60, "training.eval_every": 10}
    assert asha.rungs(recipes.load("tour", sizes | search)) == expected


def played(wers: list[float], hands: int, reduction: int = 3, diverged: tuple[int, ...] = ()) -> list[tuple[int, int]]:
    """Return the moves of a sweep whose trials have these WERs at every step; jobs finish in their order."""
    trials: dict[int, Trial] = {}
    moves, under_way = [], []
    while True:
        while len(under_way) < hands and (
            move := asha.next_move(trials, {*under_way}, [10, 30, 60], reduction, len(trials) < len(wers))
        ):
            number, target = move[0] or len(trials) + 1, move[1]
            earlier = trials.get(number, Trial(number, {}, target))
            trials[number] = dataclasses.replace(earlier, state="begun", target=target)
            moves.append((number, target))
            under_way.append(number)
        if not under_way:
            return moves
        number = under_way.pop(0)
        trial = trials[number]
        state = "diverged" if number in diverged else "finished" if trial.target == 60 else "paused"
        trials[number] = dataclasses.replace(trial, state=state, looks={**trial.looks, trial.target: wers[number - 1]})


def test_one_in_three_trials_is_promoted():
    assert played([0.5, 0.3, 0.4], hands=1) == [(1, 10), (2, 10), (3, 10), (2, 30), (2, 60)]
    moves = played([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], hands=1)
    assert [move for move in moves if move[1] == 10] == [(number, 10) for number in range(1, 10)]
    assert moves.index((2, 30)) == moves.index((6, 10)) + 1, "as soon as it is due"
    assert [number for number, target in moves if target == 30] == [1, 2, 3]
    assert [number for number, target in moves if target == 60] == [1]


def test_parallel_slots_make_each_move_once():
    for hands in (2, 3, 8):
        moves = played([0.9, 0.1, 0.7, 0.2, 0.5, 0.4, 0.3, 0.8, 0.6], hands)
        assert len(moves) == len(set(moves))
        assert (2, 60) in moves and len([move for move in moves if move[1] == 10]) == 9


def test_diverged_trial_ranks_last_and_stops():
    assert played([0.0, 0.4, 0.3], hands=1, diverged=(1,)) == [(1, 10), (2, 10), (3, 10), (3, 30), (3, 60)]


def test_lowest_wer_trains_to_end_in_incomplete_rung():
    trials = {1: Trial(1, {}, 60, "finished", {10: 0.5, 60: 0.4}), 2: Trial(2, {}, 30, "paused", {10: 0.5, 30: 0.3})}
    assert asha.next_move(trials, set(), [10, 30, 60], 3, False) == (2, 60)
    trials[2] = Trial(2, {}, 30, "paused", {10: 0.5, 30: 0.4})
    assert asha.next_move(trials, set(), [10, 30, 60], 3, False) is None


def test_interrupted_trial_comes_first():
    trials = {1: Trial(1, {}, 30, looks={10: 0.5}), 2: Trial(2, {}, 10, "paused", {10: 0.1})}
    assert asha.next_move(trials, set(), [10, 30, 60], 2, True) == (1, 30)
    assert asha.next_move(trials, {1}, [10, 30, 60], 2, True) == (2, 30)


def test_importances_rank_settings(toy_settings):
    recipe = toy_settings(SPACE)
    trials = [
        Trial(
            number,
            {
                "training.learning_rate": rate,
                "training.warmup_steps": 3,
                "training.scheduler": "linear" if rate < 1e-3 else "cosine",
            },
            4,
            "paused",
            {4: 1 / rate},
        )
        for number, rate in enumerate([1e-4, 5e-4, 2e-3, 9e-3], 1)
    ]
    found = {row["setting"].rpartition(".")[2]: row for row in results.importances(recipe, trials)}
    assert (found["learning_rate"]["explained"], found["learning_rate"]["direction"]) == (pytest.approx(1), -1)
    assert found["scheduler"]["explained"] == pytest.approx(0.8)
    assert found["warmup_steps"]["explained"] == 0
    assert {row["trials"] for row in found.values()} == {4}
    broken = Trial(5, {**trials[0].settings, "training.learning_rate": 1e-5}, 4, "diverged", {4: 0.1})
    failed = dataclasses.replace(broken, number=6, state="failed")
    found = {row["setting"].rpartition(".")[2]: row for row in results.importances(recipe, [*trials, broken, failed])}
    assert (found["learning_rate"]["explained"], found["learning_rate"]["direction"]) == (pytest.approx(1), -1)
    assert found["learning_rate"]["trials"] == 5


# --- a whole sweep ----------------------------------------------------------------------------------------------------


def test_sweep_never_reads_the_test_split(whole):
    recipe, made, _, read = whole
    assert read == {"train", "validation"}
    assert list(made.folder.glob("reports/*")) == []
    assert not (made.folder.parent / "test_scorings.csv").exists()
    assert recipe.source.test, "there was one to be read"


def test_sweep_writes_table_figure_and_best_recipe(whole):
    recipe, made, lines, _ = whole
    assert made.folder == sweep.folder_of(recipe, made.folder.parent)
    assert made.best.state == "finished"
    finished = [trial for trial in made.trials if trial.state == "finished"]
    assert made.best.wer == min(trial.wer for trial in finished)
    assert len(finished) < len(made.trials) == 3, "some were ended early"
    table = pd.read_csv(made.folder / results.TABLE)
    assert table["trial"].iloc[0] == made.best.number
    assert {"training.learning_rate", "wer_4", "wer_8", "seconds", "run"} <= set(table)
    assert sorted(table["trial"]) == [1, 2, 3]
    assert (made.folder / results.FIGURE).read_bytes().startswith(b"\x89PNG")
    assert any(line.startswith("trial 2 to step 4: training.learning_rate=") for line in lines)
    assert re.search(
        r"trial 1 paused at step 4 of 8: WER [\d.]+; best so far [\d.]+ \(trial 1\); 1 of 3", "\n".join(lines)
    )
    words = results.format_results(made.table, made.importances)
    (rate,) = [row for row in made.importances if row["setting"] == "training.learning_rate"]
    better = {1: "smaller", -1: "larger"}[rate["direction"]]
    assert f"training.learning_rate          {rate['explained']:.2f}  {better} was better" in words
    assert f"{made.best.wer:.3f}" in words and "nan" not in words.lower()


def test_best_recipe_identifies_the_best_run(whole, runs):
    recipe, made, _, _ = whole
    best = recipes.load(made.best_recipe)
    assert {name: best.settings()[name] for name in made.best.settings} == made.best.settings
    assert best.training.keep_checkpoints == recipe.training.keep_checkpoints
    assert not best.search.space
    lines = record_log()
    cache = feature_pipeline.open_cache(best, runs=runs)
    model = training_pipeline.run(best, cache, runs=runs, progress=callbacks_progress.Progress())
    assert lines[-1] == f"this run is finished: {model.uri}"
    assert Path(model.uri).parent == made.folder / made.best.run
    assert tomllib.loads((Path(model.uri).parent / "recipe.toml").read_text("utf-8"))["training"]["seed"] == 42
    opening = made.best_recipe.read_text("utf-8")
    assert f"# Trial {made.best.number}, the best of 3" in opening
    assert f"python -m pipelines evaluate --recipe {made.best_recipe}" in opening


def test_repeated_sweep_trains_only_new_trials(whole, toy_settings, runs, monkeypatch):
    recipe, made, _, _ = whole
    monkeypatch.setattr(training_loop, "_build_trainer", lambda *args: pytest.fail("trained again"))
    again = sweep.run(recipe, runs=runs)
    assert told(again.trials) == told(made.trials)
    monkeypatch.undo()
    monkeypatch.setattr(training_loop, "validator", by_loss)
    more = sweep.run(toy_settings(SEARCH | {"search.trials": 4}), runs=runs)
    assert more.folder == made.folder
    assert [trial.settings for trial in more.trials[:3]] == [trial.settings for trial in made.trials]
    assert len(more.trials) == 4


COMMAND = """
from pipelines import __main__ as cli
from pipelines.training import loop

def by_loss(*args):
    validate = validator(*args)
    return lambda model: (lambda scores: {**scores, "wer": scores["loss"]})(validate(model))

validator, loop.validator = loop.validator, by_loss
cli.main()
"""


@pytest.mark.slow
def test_killed_sweep_resumes_to_the_same_result(whole, toy_recipe, toy_model, fresh_runs):
    recipe, made, _, _ = whole
    given = {"model.base": str(toy_model), **base_settings.flatten(SEARCH)}
    set_ = [word for name, value in given.items() for word in ("--set", f"{name}={as_argument(value)}")]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", COMMAND, "sweep", "--recipe", str(toy_recipe), "--runs", str(fresh_runs), *set_]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if re.match("  trial [12]: resuming from checkpoint-4", line):
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    folder = fresh_runs / made.folder.name
    assert {trial["state"] for trial in noted(folder)} >= {"begun"}
    again = sweep.run(recipe, runs=fresh_runs)
    assert told(again.trials) == told(made.trials)
    assert (again.best.settings, again.importances) == (made.best.settings, made.importances)


def as_argument(value) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@pytest.mark.slow
def test_ctrl_c_during_training_is_resumable(whole, fresh_runs, monkeypatch):
    recipe, made, _, _ = whole

    def interrupted(*args):
        validate = by_loss(*args)
        return lambda model: signal.raise_signal(signal.SIGINT) or validate(model)

    monkeypatch.setattr(training_loop, "validator", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(Unfinished, match="SIGINT ended training"):
            sweep.run(recipe, runs=fresh_runs)
    finally:
        signal.signal(signal.SIGINT, before)
    (begun,) = Record(fresh_runs / made.folder.name).trials.values()
    assert (begun.state, begun.target) == ("begun", 4)
    assert (fresh_runs / made.folder.name / begun.run / "checkpoints" / "checkpoint-4").exists()


def test_ctrl_c_between_trainings_is_resumable(toy_settings, runs, monkeypatch):
    monkeypatch.setattr(feature_pipeline, "run", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(Unfinished, match="Run the same command again"):
        sweep.run(toy_settings(SEARCH | {"search.seed": 1}), runs=runs)


@pytest.mark.slow
def test_exhausted_budget_still_gives_a_model(whole, toy_settings, runs):
    made = sweep.run(toy_settings(SEARCH | {"search.seed": 2, "search.max_hours": 1e-9}), runs=runs)
    assert [(trial.number, trial.state) for trial in made.trials] == [(1, "finished")]


@pytest.mark.slow
def test_trial_error_is_recorded_common_error_raised(whole, toy_settings, runs, monkeypatch):
    wild = {"search.space.training.learning_rate": {"kind": "choice", "values": [1e-3, 1e36]}}
    small = {"search.trials": 2, "search.reduction": 1, "training.steps": 2, "training.eval_every": 2}
    made = sweep.run(toy_settings(wild | small), runs=runs)
    assert [trial.state for trial in made.trials] == ["finished", "diverged"]
    assert "training diverged" in made.trials[1].reason
    assert made.table["state"].tolist() == ["finished", "diverged"]
    lora = {"search.space.model.adapter": {"kind": "choice", "values": ["", "lora"]}}
    monkeypatch.setitem(sys.modules, "peft", None)
    recipe = toy_settings(lora | small)
    made = sweep.run(recipe, runs=runs)
    assert [trial.state for trial in made.trials] == ["finished", "failed"]
    assert "pip install 'peft" in made.trials[1].reason
    monkeypatch.undo()
    assert [trial.state for trial in sweep.run(recipe, runs=runs).trials] == ["finished", "finished"]
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(LabError, match="pip install 'peft"):
        sweep.run(toy_settings(lora | small | {"model.adapter": "lora"}), runs=runs)


SMALL = {"search.trials": 2, "search.reduction": 1, "training.steps": 2, "training.eval_every": 2}
TWO_RATES = {"search.space.training.learning_rate": {"kind": "choice", "values": [1e-3, 2e-3]}}
"""The toy recipe's rate, and another."""


def faulty(fault: BaseException, rate: float = 2e-3):
    """`_build_trainer`, which raises where a trial has this learning rate."""
    build = training_loop._build_trainer

    def raising(run, *args):
        if run.recipe.training.learning_rate == rate:
            raise fault
        return build(run, *args)

    return raising


@pytest.mark.parametrize(
    "fault",
    [
        ValueError("Target modules {'q'} not found in the base model.\nCheck the target modules"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids=["peft", "torch", "memory"],
)
def test_unexpected_trial_error_does_not_end_sweep(whole, toy_settings, runs, monkeypatch, fault):
    recipe = toy_settings(TWO_RATES | SMALL | {"search.seed": 3})
    with monkeypatch.context() as patch:
        patch.setattr(training_loop, "_build_trainer", faulty(fault))
        made = sweep.run(recipe, runs=runs)
    assert [trial.state for trial in made.trials] == ["finished", "failed"]
    reason = made.trials[1].reason
    note = made.folder / made.trials[1].run / "traceback.txt"
    assert reason.startswith(f"{type(fault).__name__}: {str(fault).partition('.')[0]}") and "\n" not in reason
    assert str(note) in reason and "in raising" in note.read_text("utf-8")
    shutil.rmtree(made.folder)


@pytest.mark.parametrize(
    ("fault", "free"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 10**9),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 10**9),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), 4096),
    ],
    ids=["system", "safetensors", "torch"],
)
def test_full_disk_ends_sweep_with_one_line(whole, toy_settings, runs, monkeypatch, fault, free):
    recipe = toy_settings(TWO_RATES | SMALL | {"search.seed": 4})
    with monkeypatch.context() as patch:
        patch.setattr(training_loop, "_build_trainer", faulty(fault))
        patch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 0, free))
        for _ in range(3):
            with pytest.raises(LabError, match=r"^the disk is full at \S+: free space there, then run the same"):
                sweep.run(recipe, runs=runs)
    made = sweep.run(recipe, runs=runs)
    assert [trial.state for trial in made.trials] == ["finished", "finished"], "it was no trial's doing"
    shutil.rmtree(made.folder)


class Pair:
    """An executor with two slots that returns scripted results, the last started job first."""

    slots = 2

    def __init__(self, **results: str):
        self.results, self.running, self.started = results, [], []

    def start(self, job) -> None:
        self.running.append(job)
        self.started.append(job.number)

    def wait(self):
        job = self.running.pop()
        if self.results[f"trial_{job.number}"] == "trained":
            return trial_run.fit(job)
        return trial_run.Result(job.number, "failed", reason=f"trial {job.number} has no luck")


def test_parallel_trial_may_fail_before_first_success(whole, toy_settings, runs, monkeypatch):
    recipe = toy_settings(SPACE | SMALL | {"search.trials": 3, "search.seed": 9})
    monkeypatch.setattr(executors, "open_executor", lambda *args: contextlib.nullcontext(pair))
    pair = Pair(trial_1="failed", trial_2="failed", trial_3="failed")
    with pytest.raises(LabError, match="trial 1 has no luck"):
        sweep.run(recipe, runs=runs)
    assert pair.started == [1, 2], "no third is begun where none has got past that"
    pair = Pair(trial_1="trained", trial_2="failed", trial_3="trained")
    made = sweep.run(recipe, runs=runs)
    assert [trial.state for trial in made.trials] == ["finished", "failed", "finished"]
    assert pair.started == [1, 2, 3]


class Killed(BaseException):
    """Stands for SIGKILL: no handler runs."""


def killed_at(*steps: int, rate: float):
    """Return a `loop.train` that kills a trial with this learning rate once at each of these steps."""
    train, left = training_loop.train, list(steps)

    def kill(step: int) -> None:
        if left and step == left[0]:
            del left[0]
            raise Killed

    def killing(run):
        if run.recipe.training.learning_rate == rate:
            run = dataclasses.replace(run, progress=dataclasses.replace(run.progress, on_step=kill))
        return train(run)

    return killing


@pytest.mark.slow
def test_trial_that_kills_twice_fails_others_continue(whole, toy_settings, runs, monkeypatch):
    recipe = toy_settings(TWO_RATES | SMALL | {"search.seed": 5})
    monkeypatch.setattr(training_loop, "train", killed_at(1, 1, 1, rate=2e-3))
    for _ in range(2):
        with pytest.raises(Killed):
            sweep.run(recipe, runs=runs)
    made = sweep.run(recipe, runs=runs)
    assert [trial.state for trial in made.trials] == ["finished", "failed"]
    assert made.trials[1].reason.startswith("2 processes in a row died in this trial without a new checkpoint, most")
    with pytest.raises(Killed):
        sweep.run(recipe, runs=runs)
    assert [trial.state for trial in sweep.run(recipe, runs=runs).trials] == ["finished", "finished"]


@pytest.mark.slow
def test_first_trial_that_kills_twice_ends_sweep(whole, toy_settings, runs, monkeypatch):
    recipe = toy_settings(TWO_RATES | SMALL | {"search.seed": 6})
    monkeypatch.setattr(training_loop, "train", killed_at(1, 1, rate=1e-3))
    for _ in range(2):
        with pytest.raises(Killed):
            sweep.run(recipe, runs=runs)
    with pytest.raises(LabError, match="2 processes in a row died in this trial"):
        sweep.run(recipe, runs=runs)
    assert [trial.state for trial in sweep.run(recipe, runs=runs).trials] == ["finished", "finished"]


@pytest.mark.slow
def test_kills_with_progress_do_not_fail_a_trial(whole, toy_settings, runs, monkeypatch):
    recipe = toy_settings(TWO_RATES | SMALL | {"search.seed": 7, "training.steps": 6})
    monkeypatch.setattr(training_loop, "train", killed_at(1, 3, 5, 5, rate=2e-3))
    for _ in range(4):
        with pytest.raises(Killed):
            sweep.run(recipe, runs=runs)
    made = sweep.run(recipe, runs=runs)
    assert [trial.state for trial in made.trials] == ["finished", "finished"]
    assert {(trial.attempts, trial.sent_from) for trial in made.trials} == {(0, 0)}


def test_trial_waits_for_lock_of_earlier_worker(whole, toy_settings, runs, monkeypatch):
    recipe = toy_settings(TWO_RATES | SMALL | {"search.seed": 8})
    waited: list[float] = []

    def release(seconds: float) -> None:
        waited.append(seconds)
        held.release()

    jobs = sweep._Jobs(recipe, sweep.folder_of(recipe, runs).name, runs)
    folder = jobs.of(Trial(1, {"training.learning_rate": 1e-3}, 2)).run
    folder.mkdir(parents=True)
    with training_run.lock_run(folder) as held:
        monkeypatch.setattr("filelock._api.time.sleep", release)
        made = sweep.run(recipe, runs=runs)
    assert waited and [trial.state for trial in made.trials] == ["finished", "finished"]


class Nodes:
    """A fake of Ray for the monitor: this machine's node, and another node with a GPU."""

    def __init__(self, head: str, node: str):
        self.gcs_address, self.get_node_id = head, lambda: "this"
        self.get_runtime_context = lambda: self
        address, port = node.split(":")
        self.this = {"NodeID": "this", "Alive": True, "NodeManagerAddress": address, "NodeManagerPort": int(port)}
        self.other = {"NodeID": "other", "Alive": True, "Resources": {"GPU": 1.0}}

    def nodes(self) -> list[dict]:
        return [self.this, self.other]


@pytest.fixture
def watched(monkeypatch):
    """Yield a monitor, the sockets of head and node, the fake of Ray, and the log lines."""
    monkeypatch.setattr(executors, "_CHECK_INTERVAL_S", 0.0)
    monkeypatch.setattr(executors, "_CHECKS_BETWEEN_WARNINGS", 10)
    with socket.create_server(("127.0.0.1", 0)) as head, socket.create_server(("127.0.0.1", 0)) as node:
        nodes = Nodes(*(f"127.0.0.1:{listening.getsockname()[1]}" for listening in (head, node)))
        lines = record_log()
        yield executors.ClusterMonitor(nodes, "GPU"), head, node, nodes, lines


def test_missing_machines_are_logged_at_intervals(watched):
    monitor, _, _, nodes, lines = watched
    monitor.check(2)
    assert lines == []
    nodes.other["Alive"] = False
    for _ in range(executors._CHECKS_BETWEEN_WARNINGS):
        monitor.check(2)
    assert lines == ["no machine of the Ray cluster has a GPU now: 2 trial(s) wait until one joins"]
    monitor.check(2)
    assert len(lines) == 2
    nodes.other["Alive"] = True
    monitor.check(2)
    nodes.other["Alive"] = False
    monitor.check(1)
    assert len(lines) == 3


@pytest.mark.parametrize(("which", "name"), [(1, "the head of"), (2, "this machine's node of")])
def test_lost_cluster_ends_sweep_slow_one_does_not(watched, monkeypatch, which, name):
    monitor, place = watched[0], watched[which]
    address, again = place.getsockname(), []
    place.close()
    with monkeypatch.context() as patch:
        patch.setattr(executors, "_SILENCE_S", 0.0)
        with pytest.raises(LabError, match=rf"^{name} the Ray cluster is gone \(127\S+: restart it, or another"):
            monitor.check(1)
    monkeypatch.setattr(executors.time, "sleep", lambda seconds: again.append(socket.create_server(address)))
    monitor.check(1)
    assert len(again) == 1
    again[0].close()


@pytest.mark.parametrize("content", ['[{"number": 1', '[{"number": 1}]', '{"number": 1}', "[[]]", '["\xe5"]'])
def test_damaged_record_raises_one_line_error(toy_settings, tmp_path, content):
    recipe = toy_settings(SEARCH)
    folder = sweep.folder_of(recipe, tmp_path)
    folder.mkdir(parents=True)
    (folder / "trials.json").write_text(content, "latin-1")
    with pytest.raises(LabError, match=r"^the sweep's record \S+trials.json is damaged \(.*Remove it") as caught:
        sweep.run(recipe, runs=tmp_path)
    assert "\n" not in str(caught.value)


def test_trials_share_validation_split_and_cache(whole, toy_settings, runs):
    assert len(list((runs / "features").glob("tour-*"))) == 1
    searched = {"search.space.source.validation": {"kind": "choice", "values": [8, 9]}}
    small = {"search.trials": 2, "search.reduction": 1, "training.steps": 2, "training.eval_every": 2}
    other = sweep.run(toy_settings(searched | small), runs=runs)
    assert [trial.state for trial in other.trials] == ["finished", "failed"]
    assert "change the validation split" in other.trials[1].reason


def test_changed_data_is_refused_on_resume(whole, fresh_runs, runs):
    recipe, made, _, _ = whole
    folder = fresh_runs / made.folder.name
    folder.mkdir(parents=True)
    first = dataclasses.replace(made.trials[0], run="train-0123456789ab")
    (folder / "trials.json").write_text(json.dumps([dataclasses.asdict(first)]))
    with pytest.raises(LabError, match=r"trial 1 was train-0123456789ab and would now be train-.* start over"):
        sweep.run(recipe, runs=fresh_runs)


@pytest.mark.parametrize(
    "optimizer",
    [
        {},
        {"training.optimizer": "adafactor", "training.learning_rate": 1e-2},
        {"training.optimizer": "sgd", "training.learning_rate": 0.1},
    ],
    ids=["adamw", "adafactor", "sgd"],
)
def test_paused_run_has_weights_of_uninterrupted_run(train_toy, tmp_path, optimizer):
    drawn = {"model.dropout": 0.1, "training.steps": 8, "training.weight_decay": 0.01, **optimizer}
    alone, _ = train_toy(tmp_path / "alone", drawn)
    for _ in range(2):
        paused, lines = train_toy_until(train_toy, tmp_path / "run", drawn, 4)
        assert isinstance(paused, interruptions.Paused)
        assert [row["step"] for row in paused.history if "eval_wer" in row] == [4]
    assert lines == ["resuming from checkpoint-4"]
    made, _ = train_toy(tmp_path / "run", drawn)
    assert made.best_step == 8, "the last weights are compared"
    one, other = (load_file(Path(model.uri) / "model.safetensors") for model in (alone, made))
    assert all(torch.equal(one[name], other[name]) for name in one)


def train_toy_until(train_toy, run: Path, overrides: dict, until: int):
    """Run `train_toy` until it pauses at a step."""
    train, lines = training_loop.train, None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_loop, "train", lambda run: train(dataclasses.replace(run, until=until)))
        ended, lines = train_toy(run, overrides)
    return ended, lines


# --- the command ------------------------------------------------------------------------------------------------------


def test_sweep_dry_run_prints_space_and_writes_nothing(tmp_path, capsys):
    given = [
        "--recipe",
        "tour-search",
        "--set",
        "search.space.training.learning_rate.high=1e-2",
        "--runs",
        str(tmp_path),
    ]
    app(["sweep", *given, "--dry-run"], standalone_mode=False)
    out = capsys.readouterr().out
    assert "training.learning_rate: loguniform from 1e-05 to 0.01" in out
    assert "training.scheduler: one of" in out and "after 10, 30, 60 steps" in out and "nothing was done" in out
    assert list(tmp_path.iterdir()) == []
    app(["recipe", "tour-search"], standalone_mode=False)
    assert "search.trials = 8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "why"),
    [(["--recipe", "tour"], "has no search space"), (["--devices", "2"], "needs --cluster")],
)
def test_impossible_sweep_raises_one_line_error(given, why, tmp_path):
    with pytest.raises(LabError, match=why):
        app(["sweep", *given, "--runs", str(tmp_path)], standalone_mode=False)


def test_documented_search_space_is_valid():
    (block,) = re.findall(r"^```toml\n(.*?)^```", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    search_space.check(recipes.resolve(tomllib.loads(block), {}))


# --- your own loop ----------------------------------------------------------------------------------------------------


def examples() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def test_documented_loop_equals_the_trainer(toy_settings, train_toy, runs, tmp_path, monkeypatch, capsys):
    loop = examples()[0]
    assert len(loop.splitlines()) < 30
    settings = {"evaluation.max_new_tokens": 3, "training.scheduler": "cosine", "training.weight_decay": 0.1}
    made, _ = train_toy(tmp_path / "run", settings)
    recipe = toy_settings(settings)
    monkeypatch.setattr(recipes, "load", lambda *args: recipe)
    monkeypatch.setenv("LAB_RUNS", str(runs))
    names: dict = {}
    exec(compile(loop, "docs/sweeps.md", "exec"), names)
    looks = [row for row in made.history if "eval_wer" in row]
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [look["loss"] for look in printed] == [look["eval_loss"] for look in looks]
    assert len(printed) == 3


@pytest.mark.parametrize("chosen", [{}, {"model.freeze_encoder": True, "training.scheduler": "cosine"}])
def test_optimizer_and_schedule_match_transformers(toy_settings, toy_model, tmp_path, chosen):
    """Older runs must keep their weights and names."""
    from transformers import Trainer

    settings = toy_settings({"training.weight_decay": 0.1, "training.beta2": 0.98, **chosen})
    model = components.build_model(settings, whisper_model.resolve(str(toy_model)))
    stock = Trainer(model, trainer.arguments_of(settings, tmp_path, "float32", drops_layers=False), eval_dataset=[0])
    stock.create_optimizer_and_scheduler(settings.training.steps)
    ours = components.build_optimizer(settings, model)
    schedule = components.build_scheduler(settings, ours)
    assert type(ours) is type(stock.optimizer)
    assert len(ours.param_groups) == len(stock.optimizer.param_groups) == 2
    for one, other in zip(ours.param_groups, stock.optimizer.param_groups, strict=True):
        assert [id(weights) for weights in one.pop("params")] == [id(weights) for weights in other.pop("params")]
        assert one == other
    for _ in range(settings.training.steps):
        assert schedule.get_last_lr() == stock.lr_scheduler.get_last_lr()
        for scheduler in (schedule, stock.lr_scheduler):
            scheduler.step()


@pytest.mark.parametrize(("name", "kind"), [("adafactor", torch.optim.Adafactor), ("sgd", torch.optim.SGD)])
def test_recipe_selects_the_optimizer(toy_settings, toy_model, name, kind):
    settings = toy_settings({"training.optimizer": name, "training.weight_decay": 0.1, "training.beta1": 0.8})
    made = components.build_optimizer(settings, whisper_model.load(whisper_model.resolve(str(toy_model))))
    assert type(made) is kind
    assert [group["weight_decay"] for group in made.param_groups] == [0.1, 0.0]
    assert {group["lr"] for group in made.param_groups} == {1e-3}
    assert {group.get("momentum") for group in made.param_groups} == ({0.8} if name == "sgd" else {None})


def test_each_component_can_be_replaced(toy_settings, toy_cache):
    settings = toy_settings({"evaluation.max_new_tokens": 3})
    linear = torch.nn.Linear(2, 2)
    parts = components.build(
        settings,
        toy_cache,
        model=linear,
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.5),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.5),
        loader=[{"x": torch.ones(1)}],
        validate=lambda model: {"wer": 0.5},
    )
    assert parts.model is linear and isinstance(parts.optimizer, torch.optim.SGD)
    assert parts.optimizer.param_groups[0]["params"] == list(linear.parameters())
    assert parts.scheduler.get_last_lr() == [0.25]
    assert parts.loader == [{"x": torch.ones(1)}] and parts.validate(None) == {"wer": 0.5}
    assert [batch for batch, _ in zip(parts.batches(), range(3))] == parts.loader * 3
    held_out = [row for batch in parts.validation_loader for row in batch["labels"]]
    assert len(held_out) == len(toy_cache.split("validation"))
    with pytest.raises(LabError, match="got 'test'"):
        components.build_loader(settings, toy_cache, parts.processor, "test")
