from __future__ import annotations

import dataclasses
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from log_recorder import record_log

from pipelines.experiments import test_set_log
from pipelines.experiments.test_set_log import NAME
from pipelines.infra.errors import LabError

ROOT = Path(__file__).parents[2]
NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)
TEST_SET = "0123456789abcdef"


@pytest.fixture
def noted(tmp_path, monkeypatch):
    """Return `noted("model", report="r1")`, which logs a scoring and returns the counts."""
    from pipelines.whisper import model as whisper_model

    monkeypatch.setattr(whisper_model, "identity", lambda ref: {"weights_sha256": ref})

    def note(model="m", report="toy/reports/test-1", recipe="toy", tuned=True, test_set=TEST_SET, is_new=True):
        lineage = {"base": "b", **({"digest": model} if tuned else {})}
        told = SimpleNamespace(
            folder=tmp_path / report, model=f"{model}, tuned @ 1", test_set=test_set, lineage=lineage
        )
        return test_set_log.add(tmp_path, told, model, recipe, is_new=is_new, now=NOON)

    return note


def counts(looks: test_set_log.ScoringCounts) -> tuple[int, int, int]:
    return looks.scorings, looks.of_model, looks.models


def test_each_scoring_adds_a_row(noted, tmp_path):
    assert counts(noted()) == (1, 1, 1)
    lines = (tmp_path / NAME).read_text("utf-8").splitlines()
    assert lines[0] == "when,recipe,model,model_digest,tuned,report,test_set"
    assert lines[1].startswith('2026-01-02T12:00:00+00:00,toy,"m, tuned @ 1",')
    assert lines[1].endswith(f",yes,toy/reports/test-1,{TEST_SET}")
    (row,) = test_set_log.read(tmp_path)
    assert (row["model"], row["report"]) == ("m, tuned @ 1", "toy/reports/test-1")
    before = (tmp_path / NAME).read_bytes()
    noted("other", "toy/reports/test-2")
    assert (tmp_path / NAME).read_bytes().startswith(before)


def test_scorings_are_counted_per_model_and_recipe(noted):
    assert counts(noted("base", "toy/reports/test-0", tuned=False)) == (1, 1, 1)
    first = noted("m", "toy/reports/test-1")
    assert (counts(first), first.warning()) == ((2, 1, 2), "")
    assert counts(noted("n", "toy/reports/test-2")) == (3, 1, 3)
    again = noted("m", "toy/reports/test-3")
    assert counts(again) == (4, 2, 3)
    assert again.warning().startswith(
        "warning: this model was scored on this test set 2 times, and recipe toy scored 3 "
    )
    assert "\n" not in again.warning() + str(again)
    assert counts(noted("m", "toy/reports/test-4", test_set="f" * 16)) == (1, 1, 1)


def test_base_model_is_counted_per_recipe(noted):
    noted("base", "one/reports/test-1", "one", tuned=False)
    noted("m", "one/reports/test-2", "one")
    assert noted("base", "two/reports/test-1", "two", tuned=False).warning() == ""
    assert noted("base", "two/reports/test-9", "two", tuned=False).warning()
    assert noted("m", "two/reports/test-2", "two").of_model == 2


def test_existing_report_adds_no_scoring(noted, tmp_path):
    noted("m", "toy/reports/test-1")
    (tmp_path / f".{NAME}.lock").unlink()
    assert counts(noted("m", "toy/reports/test-1", is_new=False)) == (1, 1, 1)
    assert not (tmp_path / f".{NAME}.lock").exists(), "nothing is written"
    assert counts(noted("m", "toy/reports/test-1")) == (2, 2, 1), "made anew, it is one"
    assert counts(noted("m", "toy/reports/test-7", is_new=False)) == (3, 3, 1), "unknown to the log, it was one"


@pytest.mark.parametrize(
    "torn", [b"2026-01-02T12:00:00+00:00,toy,m,d", b'2026,toy,"m, tu', b"when,rec", b"\xff\xfe\x00"]
)
def test_torn_row_is_ignored(noted, tmp_path, torn):
    noted("m", "toy/reports/test-1")
    with open(tmp_path / NAME, "ab") as file:
        file.write(torn)
    assert counts(noted("n", "toy/reports/test-2")) == (2, 1, 2)
    assert torn not in (tmp_path / NAME).read_bytes().split(b"\n")


@pytest.mark.parametrize("cut", [1, 30, 60, 100, 139])
def test_torn_header_at_any_length_is_repaired(noted, tmp_path, cut):
    noted()
    content = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(content[:cut])
    assert counts(noted("n", "toy/reports/test-2")) == (1, 1, 1)


@pytest.mark.slow
def test_concurrent_writers_lose_no_row(tmp_path):
    code = f"""
import sys
from pathlib import Path
from types import SimpleNamespace
from pipelines.experiments import test_set_log
from pipelines.whisper import model
model.identity = lambda ref: {{"weights_sha256": ref}}
runs = Path(sys.argv[1])
for n in range(40):
    report = SimpleNamespace(folder=runs / f"{{sys.argv[2]}}-{{n}}", model="m", test_set="{TEST_SET}", lineage={{}})
    test_set_log.add(runs, report, "m", "toy", is_new=True)
"""
    writers = [subprocess.Popen([sys.executable, "-c", code, tmp_path, name], cwd=ROOT) for name in "ab"]
    assert [writer.wait(300) for writer in writers] == [0, 0]
    lines = (tmp_path / NAME).read_text("utf-8").splitlines()
    assert (len(lines), len(test_set_log.read(tmp_path)), len(set(lines[1:]))) == (81, 80, 80)


def test_unwritable_log_raises_one_line_error(noted, tmp_path):
    (tmp_path / NAME).mkdir()
    with pytest.raises(LabError, match="cannot be written .*: free space or make it writable"):
        noted()


# ---- as a stage


@pytest.fixture
def scored(toy_settings, toy_cache, toy_model, tmp_path, monkeypatch):
    """Return `scored(overrides)`, which evaluates the base model on the test split and returns the log lines."""
    from pipelines.experiments import pipeline as experiment_pipeline
    from pipelines.whisper import decoding
    from pipelines.whisper import model as whisper_model

    def decode_rows(model, processor, cache, rows, options, on_clips):
        on_clips(len(rows))
        return [decoding.Hypothesis(cache.rows["text"].iloc[row], -0.1, 5) for row in rows]

    monkeypatch.setattr(decoding, "decode_rows", decode_rows)
    monkeypatch.setattr(whisper_model, "load", lambda ref, **told: None)
    monkeypatch.setattr(decoding, "engine_name", lambda model: "transformers cpu float32")

    def evaluate(overrides=None, split="test") -> list[str]:
        told = record_log()
        experiment_pipeline.evaluate(toy_settings(overrides), toy_cache, str(toy_model), split, runs=tmp_path)
        return told

    return evaluate


def test_test_scoring_is_logged_and_repeated_one_warns(scored, tmp_path):
    (told,) = scored()
    assert "scoring number 1, 1 of them of this model; models that recipe toy scored on it: 1" in told
    assert [told] == scored(), "the report was read: no scoring"
    (warned,) = scored({"evaluation.max_new_tokens": 9})
    assert warned.startswith("warning: this model was scored on this test set 2 times")
    assert "\n" not in warned
    assert len(test_set_log.read(tmp_path)) == 2


def test_validation_and_dev_runs_are_not_counted(scored, tmp_path):
    scored(split="validation")
    scored({"training.fast_dev_run": True})
    assert not (tmp_path / NAME).exists()


def test_counts_of_returns_counts_of_a_report(scored, tmp_path):
    from pipelines.experiments import evaluation

    scored()
    (folder,) = (tmp_path / "toy" / "reports").iterdir()
    report = evaluation.read_report(folder)
    assert counts(test_set_log.counts_of(tmp_path, report)) == (1, 1, 1)
    assert test_set_log.counts_of(tmp_path, dataclasses.replace(report, test_set="f" * 16)) is None
    assert test_set_log.counts_of(tmp_path / "none", report) is None
