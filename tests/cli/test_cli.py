"""The command line: output, errors and exit codes; and a complete toy experiment by commands."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import typer
from pasted import parse

from pipelines import __main__ as cli
from pipelines.cli.options import load_recipe
from pipelines.features import pipeline as feature_pipeline
from pipelines.features import rejections
from pipelines.features.cache import FeatureCache
from pipelines.infra import manifest
from pipelines.infra.errors import LabError

ROOT = Path(__file__).parents[2]
COMMANDS = [
    f"{name} {part}".strip()
    for name, command in typer.main.get_command(cli.app).commands.items()
    for part in getattr(command, "commands", [""])
]
STAGES = ("run", "features", "train", "evaluate")
"""Commands that write below the runs folder."""
TOKEN = "hf_" + "secret" * 5


@dataclass(frozen=True)
class Completed:
    """Exit code, standard output and standard error of a command."""

    code: int
    out: str
    err: str

    @property
    def told(self) -> dict[str, Any]:
        """The one JSON object on standard output."""
        assert self.out.endswith("}\n"), self.out + self.err
        assert self.out.count("\n") == 1
        return json.loads(self.out)


@pytest.fixture
def call(capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    """`call("train", "--json")`: run a command in this process, as `python -m pipelines` would."""

    def run(*arguments: object) -> Completed:
        monkeypatch.setattr(sys, "argv", ["pipelines", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return Completed(code, *capfd.readouterr())

    return run


def test_features_with_too_many_faults_prints_them_and_fails(call, monkeypatch, tmp_path):
    rows = [{"id": str(n), "split": "train", "reason": "unreadable", "detail": "no audio"} for n in range(3)]
    lines = ["id,split,reason,detail", *(",".join(row.values()) for row in rows)]
    (tmp_path / "rejected.csv").write_text("\n".join(lines) + "\n")
    cache = FeatureCache(tmp_path, {"features.n_mels": 80}, pd.DataFrame({"id": ["x"]}), {"train": 1}, np.zeros(0))
    monkeypatch.setattr(feature_pipeline, "run", lambda *_, **__: rejections.check_share(cache, 0.2))
    done = call("features", "--json")
    assert done.code == 1 and "3 of 4 clips cannot be used" in done.err and done.err.count("error:") == 1
    assert done.told["rejected"] == [
        {"reason": "unreadable", "clips": 3, "example": "0", "detail": "no audio", "fault": True}
    ]
    assert done.told["rejected_csv"] == str(tmp_path / "rejected.csv")


def process(*arguments: str, **variables: str) -> Completed:
    """Run a command in a separate process."""
    command = [sys.executable, "-m", "pipelines", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, check=False)
    return Completed(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set LAB_RUNS to a folder that does not exist yet."""
    monkeypatch.setenv("LAB_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and modification time of every file below `folder` except stages.json, which has times."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "stages.json")
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


# --- help -------------------------------------------------------------------------------------------------------------


def test_commands_follow_the_pipeline_order():
    assert COMMANDS[:8] == ["run", "features", "train", "distill", "merge", "evaluate", "compare", "leaderboard"]
    assert COMMANDS[-6:] == ["recipe", "doctor", "project new", "project train", "project check", "project pack"]
    assert {"transcribe", "serve", "publish-space"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_help_has_an_example(call, command: str):
    done = call(*command.split(), "--help")
    assert done.code == 0
    assert f"Example: python -m pipelines {command}" in done.out
    assert "--json" in done.out


def test_no_command_lists_all_commands(call):
    done = call()
    assert all(command.split()[0] in done.out + done.err for command in COMMANDS)


# --- dry runs ---------------------------------------------------------------------------------------------------------

WOULD = {
    "run": "execute 01_feature_pipeline, 02_training_pipeline, 03_inference_app",
    "features": "make a feature cache of the source 'tour'",
    "train": "train 7 steps from no/where",
    "evaluate": "score no/where on test",
}


@pytest.mark.parametrize("command", STAGES)
def test_dry_run_prints_plan_and_writes_nothing(call, runs: Path, command: str):
    settings = ("--set", "training.steps=7", "--set", "model.base=no/where")
    done = call(command, "--dry-run", *settings)
    assert (done.code, done.err) == (0, "")
    assert f"would {WOULD[command]}" in done.out
    assert f"would write below {runs}" in done.out
    told = call(command, "--dry-run", "--json", *settings).told
    assert (told["dry_run"], told["would"]) == (True, WOULD[command])
    assert told["recipe"]["training.steps"] == 7
    assert not runs.exists()


# --- what a user can get wrong ----------------------------------------------------------------------------------------


def one_line(done: Completed) -> str:
    """Return the message of a command that failed with one line."""
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1, done.err
    return done.err


@pytest.mark.parametrize("command", [*STAGES, "recipe"])
@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("training.stepz=3", "unknown setting 'training.stepz'; did you mean 'training.steps'?"),
        ("trianing.steps=3", "did you mean 'training.steps'?"),
        ("steps=3", "did you mean 'training.steps'?"),
        ("training.steps=many", "setting training.steps: "),
        ("training.steps=0", "setting training.steps: "),
        ("training.steps", "--set takes NAME=VALUE such as training.steps=60, got 'training.steps'"),
    ],
)
def test_wrong_setting_prints_one_line_and_exits_1(call, runs: Path, command: str, setting: str, complaint: str):
    assert complaint in one_line(call(command, "--set", setting))
    assert not runs.exists()


@pytest.mark.slow
def test_wrong_setting_in_a_separate_process(tmp_path: Path):
    done = process("train", "--set", "training.stepz=3", "--json", LAB_RUNS=str(tmp_path))
    assert "did you mean 'training.steps'?" in one_line(done)


@pytest.mark.parametrize("command", STAGES)
def test_unknown_recipe_suggests_the_nearest_name(call, runs: Path, command: str):
    assert "no recipe 'tuor'; did you mean 'tour'?" in one_line(call(command, "--recipe", "tuor"))


def test_invalid_toml_recipe_is_named(call, tmp_path: Path):
    for content in ("name = ", "a = " + "9" * 5_000):
        (tmp_path / "mine.toml").write_text(content)
        assert "mine.toml is not valid TOML" in one_line(call("recipe", tmp_path / "mine.toml"))


def test_training_without_features_names_the_command(call, runs: Path):
    assert "python -m pipelines features --recipe tour" in one_line(call("train", "--json"))


def test_ctrl_c_prints_no_traceback(call, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cli, "app", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    done = call("train")
    assert (done.code, done.err) == (130, "stopped; run the same command again to continue\n")


def test_unexpected_error_keeps_its_traceback(call, monkeypatch: pytest.MonkeyPatch):
    """Only LabError is printed as a message."""
    monkeypatch.setattr(cli, "app", lambda: (_ for _ in ()).throw(ZeroDivisionError))
    with pytest.raises(ZeroDivisionError):
        call("train")
    assert not issubclass(ZeroDivisionError, LabError)


# --- recipe -----------------------------------------------------------------------------------------------------------


def test_recipe_command_prints_all_settings(call):
    from pipelines.recipes import setting_names

    told = call("recipe", "tour", "--set", "training.steps=7", "--json").told
    assert told.keys() == set(setting_names())
    assert told["training.steps"] == 7
    assert "training.steps = 7\n" in call("recipe", "--set", "training.steps=7").out


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("source.path=2024", "2024"),
        ("source.revision=1e5", "1e5"),
        ("source.splits.validation=null", "null"),
        ('source.path="2024"', "2024"),
        ("source.path=a=b", "a=b"),
        ("training.steps=7", 7),
        ('curation.held_out=["2024"]', ["2024"]),
    ],
)
def test_text_setting_takes_the_value_unchanged(call, setting: str, value):
    assert call("recipe", "--set", setting, "--json").told[setting.partition("=")[0]] == value


# --- a life -----------------------------------------------------------------------------------------------------------


def test_commands_run_a_complete_toy_experiment(call, runs: Path, toy_recipe: Path, toy_model: Path, tmp_path: Path):
    toy = ("--recipe", toy_recipe, "--set", f"model.base={toy_model}", "--json")

    features = call("features", *toy).told
    assert Path(features["cache_uri"]).is_relative_to(runs)
    assert features["counts"] == {"train": 48, "validation": 8, "test": 12} | features["counts"]
    assert features["bytes"] < features["padded_bytes"]

    train = call("train", *toy).told
    assert Path(train["model_uri"], "model.safetensors").is_file()
    assert train["best_step"] in (4, 8, 12)
    assert len(train["digest"]) == 12

    sealed = snapshot(Path(train["model_uri"]))
    made = json.loads(Path(train["model_uri"], "manifest.json").read_text("utf-8"))["made"]
    log = tmp_path / "log.csv"
    evaluate = call("evaluate", *toy, "--log", log).told
    assert evaluate["split"] == "test"
    assert evaluate["score"]["n"] == evaluate["raw"]["n"] == 12
    low, high = evaluate["score"]["ci95"]
    assert low <= evaluate["score"]["wer"] <= high
    assert Path(evaluate["page"]).read_text("utf-8").startswith("<!doctype html>")
    assert evaluate["model"].startswith("toy-"), "without --model, the model that was trained last"
    manifest = json.loads(Path(train["model_uri"], "manifest.json").read_text("utf-8"))
    assert manifest["test"]["wer"] == evaluate["score"]["wer"], "the model keeps its test score"
    added = ("README.md", "manifest.json")
    files = {name: stat for name, stat in snapshot(Path(train["model_uri"])).items() if name not in added}
    assert files.items() <= sealed.items()
    assert manifest["made"] == made, "it makes no model newer"
    assert len(log.read_text("utf-8").splitlines()) == 13
    assert [evaluate["looks"][name] for name in ("scorings", "of_model", "models")] == [1, 1, 1]
    validation = call("evaluate", *toy, "--split", "validation").told
    assert (validation["split"], validation["score"]["n"]) == ("validation", 8)
    assert "looks" not in validation

    before = snapshot(runs)
    assert call("features", *toy).told == features
    assert call("train", *toy).told == train
    assert call("evaluate", *toy).told == evaluate
    assert snapshot(runs) == before, "a second call makes nothing anew"

    call("evaluate", *toy, "--model", toy_model)
    compared = call("compare", "toy", "--json").told
    base, tuned = compared["experiments"]
    assert (base["experiment"], tuned["experiment"], tuned["models"]) == ("(a local path)", "toy", [train["digest"]])
    assert tuned["wer"] == pytest.approx(evaluate["score"]["wer"])
    assert tuned["delta"] == pytest.approx(tuned["wer"] - base["wer"])
    assert Path(compared["folder"], "comparison.png").is_file()
    assert [row["model"] for row in call("compare", "--json").told["experiments"]] == [train["digest"]]
    (ranked,) = call("leaderboard", "toy", "--json").told["ranked"]
    assert (ranked["status"], ranked["wer"]) == ("valid", evaluate["score"]["wer"])

    spoken = call("train", *toy[:-1])
    assert f"model {train['model_uri']}" in spoken.out
    (score,) = parse(spoken.out.splitlines()[-1])
    assert (score.name, score.recipe) == ("evaluate", load_recipe(str(toy_recipe), [toy[3]]))
    (train_again,) = parse(call("features", *toy[:-1]).out.splitlines()[-1])
    assert (train_again.name, train_again.recipe) == ("train", score.recipe)


def test_unfinished_run_exits_75_and_resumes(call, runs: Path, toy_recipe: Path, toy_model: Path, toy_cache):
    toy = ("--recipe", toy_recipe, "--cache", toy_cache.uri, "--set", f"model.base={toy_model}")
    hasty = (*toy, "--set", "training.steps=2", "--set", "training.max_hours=1e-9", "--json")
    ended = call("train", *hasty)
    assert (ended.code, ended.out) == (75, "")
    assert "\nunfinished: the time budget of 1e-09 h ended training after step 1 of 2; " in ended.err
    assert ended.err.endswith("checkpoint-1 is kept. Run the same command or cell again to continue from there\n")
    made = call("train", *hasty)
    assert made.told["best_step"] == 2
    assert "resuming from checkpoint-1" in made.err

    fork = ("--fork", made.told["model_uri"], "--set", "training.steps=1", "--json")
    forked = call("train", *toy, *fork).told
    assert json.loads(Path(forked["model_uri"], "manifest.json").read_text("utf-8"))["fork"]["step"] == 2


def test_fast_dev_run_writes_to_separate_folder(call, runs: Path, toy_recipe: Path, toy_model: Path, toy_cache):
    toy = ("--recipe", toy_recipe, "--cache", toy_cache.uri, "--set", f"model.base={toy_model}")
    done = call("train", *toy, "--fast-dev-run")
    assert done.code == 0
    assert "Its figures mean nothing" in done.out
    (score,) = parse(done.out.splitlines()[-1])
    assert score.recipe.training.fast_dev_run
    assert score.params["cache"] == toy_cache.uri
    assert str(runs / "toy-fast-dev-run") in done.out


# --- transcribe -------------------------------------------------------------------------------------------------------


def test_transcribe_continues_after_unreadable_file(call, runs: Path, toy_model: Path, tmp_path: Path, encoded, speech):
    good, broken, missing, last = (tmp_path / name for name in ("good.wav", "broken.mp3", "missing.wav", "last.ogg"))
    good.write_bytes(encoded(speech(16_000)))
    broken.write_bytes(b"this is no sound" * 100)
    last.write_bytes(encoded(speech(24_000, seed=1), format="OGG"))
    files = (good, broken, missing, last)

    done = call("transcribe", *files, "--model", toy_model)
    assert done.code == 1
    assert "Traceback" not in done.out + done.err
    heading, *lines = done.out.splitlines()
    assert heading.startswith("model ")
    assert [line.split(": ")[0] for line in lines] == [str(file) for file in files], "one line for each file"

    told = call("transcribe", *files, "--model", toy_model, "--json")
    assert told.code == 1
    rows = told.told["transcripts"]
    assert [row["file"] for row in rows] == [str(file) for file in files]
    assert [sorted(row) for row in rows] == [
        ["audio_s", "confidence", "elapsed_s", "file", "text"],
        ["error", "file"],
        ["error", "file"],
        ["audio_s", "confidence", "elapsed_s", "file", "text"],
    ]
    assert (rows[0]["audio_s"], rows[3]["audio_s"]) == (1.0, 1.5)
    assert [f"{row['file']}: {row.get('text', row.get('error'))}" for row in rows] == lines
    assert call("transcribe", good, "--model", toy_model).code == 0


def test_transcribe_refuses_missing_model(call, tmp_path: Path, encoded, speech):
    (tmp_path / "good.wav").write_bytes(encoded(speech(16_000)))
    assert "no model in" in one_line(call("transcribe", tmp_path / "good.wav", "--model", tmp_path / "none"))


@pytest.mark.parametrize("command", ["transcribe", "serve", "production", "worker"])
def test_wrong_language_fails_before_anything_else(call, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from pipelines.whisper import model as whisper_model

    monkeypatch.setattr(whisper_model, "resolve", lambda uri: pytest.fail("looked for a model"))
    arguments = {"transcribe": ["a.wav"], "production": ["m", "--to", tmp_path / "served"]}.get(command, [])
    done = call(command, *arguments, "--language", "svedish")
    assert "such as sv or Swedish, got 'svedish'; near it: swedish" in one_line(done)


def test_language_of_a_transcript_is_the_models(toy_model: Path, tmp_path: Path, call, encoded, speech):
    (tmp_path / "a.wav").write_bytes(encoded(speech(16_000)))
    tuned = shutil.copytree(toy_model, tmp_path / "tuned")
    (tuned / "manifest.json").unlink(missing_ok=True)
    manifest.seal(tuned, kind="model", name="dansk", language="da")
    for chosen, expected in (([], "danish"), (["--language", "SV"], "swedish"), (["--language", "auto"], "danish")):
        done = call("transcribe", tmp_path / "a.wav", *chosen, "--model", tuned, "--format", "json", "--again")
        assert done.code == 0
        assert json.loads((tmp_path / "a.json").read_text("utf-8"))["language"] == expected


# --- doctor -----------------------------------------------------------------------------------------------------------

CHECKS = [
    "python", "packages", "device", "disk", "audio", "speech synthesis", "hub", "hub token", "forward pass",
]  # fmt: skip


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch):
    """Disable the Hub and clear the cached result of other tests."""
    from pipelines.infra import environment

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    environment.hub_reachable.cache_clear()
    yield
    environment.hub_reachable.cache_clear()


def test_doctor_reports_a_ready_machine(call, offline, runs: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    done = call("doctor", "--model", tiny_folder, "--json")
    found = {check["name"]: check for check in done.told["checks"]}
    assert list(found) == CHECKS
    assert all(check.keys() == {"name", "state", "found", "mend"} for check in found.values())
    assert [check for check in found.values() if check["state"] == "wrong"] == []
    assert (done.code, done.told["ready"]) == (0, True)
    assert found["hub"]["state"] == "note"
    assert (found["hub token"]["state"], found["hub token"]["found"]) == ("ok", "there is one")
    assert TOKEN not in done.out + done.err
    assert not runs.exists(), "looking changes nothing"


def test_doctor_reports_problems_and_fixes(call, offline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipelines.cli.doctor._PACKAGES", ("jiwer", "not-there"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    done = call("doctor", "--model", tmp_path / "none", "--json")
    wrong = {check["name"]: check for check in done.told["checks"] if check["state"] == "wrong"}
    assert (done.code, done.told["ready"]) == (1, False)
    assert wrong.keys() == {"packages", "forward pass"}
    assert "missing: not-there" in wrong["packages"]["found"]
    assert "no model in" in wrong["forward pass"]["found"]
    assert all(check["mend"] for check in wrong.values())

    spoken = call("doctor", "--model", tmp_path / "none")
    assert spoken.code == 1
    assert "2 problem(s) to fix" in spoken.out
    assert "Traceback" not in spoken.out + spoken.err
    assert TOKEN not in done.out + done.err + spoken.out + spoken.err


# --- the smaller commands ---------------------------------------------------------------------------------------------


def test_dry_fetch_prints_folder_and_writes_nothing(call, tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    done = call("fetch", "hub://me/tour-cache", "--dry-run")
    assert (done.code, "would fetch hub://me/tour-cache" in done.out) == (0, True)
    assert str(tmp_path / "cache") in done.out
    assert not (tmp_path / "cache").exists()


def test_dry_publish_refuses_missing_folder(call, tmp_path):
    done = call("publish", tmp_path / "absent", "hub://me/x", "--dry-run")
    assert done.code == 1
    assert "absent" in one_line(done)


def test_train_split_cannot_be_scored(call):
    done = call("evaluate", "--split", "train")
    assert done.code == 2
    assert "validation" in done.err


def test_unwritable_folder_prints_one_line(call, tmp_path):
    (tmp_path / "file").write_text("no folder")
    done = call("features", "--runs", tmp_path / "file" / "runs", "--set", "source.train=2")
    assert done.code == 1
    assert "Traceback" not in done.err
    assert str(tmp_path / "file") in done.err
