"""The leaderboard: one test set and normaliser per board, and the status of each entry."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import sample_reports
from pasted import parse

from pipelines import __main__ as cli
from pipelines.experiments import leaderboard
from pipelines.experiments import pipeline as experiment_pipeline
from pipelines.experiments.comparison.validity import INVALID, UNVERIFIED, VALID
from pipelines.infra.errors import LabError
from pipelines.infra.stores import hub_client
from pipelines.training import pipeline as training_pipeline


def quiet(line: str) -> None:
    pass


def board(*sources: object, runs: Path) -> leaderboard.Board:
    return leaderboard.rank([str(source) for source in sources], runs=runs)


def entry(runs: Path, name: str = "raw") -> leaderboard.Entry:
    """Return the only entry of a board with one report."""
    found = board(name, runs=runs)
    (entry,) = (*found.ranked, *found.invalid)
    return entry


# --- the lab's reports ------------------------------------------------------------------------------------------------


def test_models_are_ranked_by_wer_with_their_origin(tmp_path: Path):
    for name, errors in (("second", 2), ("first", 1), ("third", 3)):
        sample_reports.report(tmp_path, name, sample_reports.wrong(errors))
    base = sample_reports.report(tmp_path, "first", sample_reports.wrong(6), tuned=False)
    found = board("second", "first", base.folder, "third", runs=tmp_path)
    assert [entry.by.rpartition(" ")[2] for entry in found.ranked] == ["first", "second", "third", "makers"]
    assert [round(entry.wer * 12) for entry in found.ranked] == [1, 2, 3, 6]
    first = found.ranked[0]
    assert first.base == sample_reports.BASE
    assert first.trained_on == "the lab's tour (synthetic, eSpeak NG), 960 clips, 0.96 h, cache cache0000001"
    assert (first.n, first.test_set, first.normaliser) == (60, base.test_set, base.normaliser)
    assert found.table().index.tolist() == ["1", "2", "3", "4"]
    assert found.ranked[3].status == UNVERIFIED


def test_other_test_set_is_listed_separately(tmp_path: Path):
    sample_reports.report(tmp_path, "raw", sample_reports.wrong(3))
    sample_reports.report(tmp_path, "easy", sample_reports.wrong(0), table=sample_reports.rows(speakers=6))
    found = board("raw", "easy", runs=tmp_path)
    assert [entry.wer for entry in found.ranked] == [0.25]
    assert [entry.wer for entry in found.not_comparable] == [0]
    assert "not comparable: another test set or normaliser" in str(found)


@pytest.mark.parametrize(
    ("leaks", "scored", "status", "why"),
    [
        ("drop", "", VALID, "by its settings: the recipe drops"),
        ("refuse", "", VALID, "by its settings: the recipe refuses"),
        ("ignore", "", UNVERIFIED, "is not available"),
        ("drop", "another00001", UNVERIFIED, "its training cache cache0000001 is not available"),
    ],
)
def test_status_without_cache_depends_on_settings(tmp_path: Path, leaks: str, scored: str, status: str, why: str):
    sample_reports.report(tmp_path, "raw", settings={"curation.leaks": leaks}, scored=scored)
    found = entry(tmp_path)
    assert found.status == status
    assert why in found.why


def test_few_speakers_are_unverified_and_over_clips(tmp_path: Path):
    table = sample_reports.rows().assign(speaker="me")
    table["reference"] = table["reference"].str.replace(" 1$", " ", regex=True)
    errors = sample_reports.wrong(lambda row: int(row.id[-1]))
    sample_reports.report(tmp_path, "raw", errors, settings={"curation.leaks": "drop"}, table=table)
    found = entry(tmp_path)
    assert (found.status, found.ci95) == (UNVERIFIED, None)
    assert found.ci95_over_clips[0] < found.wer < found.ci95_over_clips[1]
    assert " over clips" in str(leaderboard.rank(["raw"], runs=tmp_path))


def test_fork_of_unchecked_run_is_unverified(tmp_path: Path):
    parent = {"run": "0123456789ab", "step": 4, "weights_sha256": "f" * 64}
    sample_reports.report(tmp_path, "raw", settings={"curation.leaks": "drop"}, fork=parent)
    found = entry(tmp_path)
    assert (found.status, "it started from run 0123456789ab" in found.why) == (UNVERIFIED, True)


@pytest.fixture
def trained(toy_cache, tmp_path: Path):
    """Return `trained(change)`: the entry of a model trained on the toy cache and scored on changed test rows."""
    (tmp_path / "features").mkdir()
    (tmp_path / "features" / "toy").symlink_to(toy_cache.folder)

    def make(change, split: str = "test") -> leaderboard.Entry:
        rows = toy_cache.rows.iloc[toy_cache.split(split)].reset_index(drop=True)
        table = rows[["id", "speaker", "duration_s"]].assign(reference=rows["text"])
        change(table, toy_cache.rows.iloc[toy_cache.split("train")])
        sample_reports.report(tmp_path, "raw", lambda row: row.reference, table=table, cache=toy_cache.digest)
        return entry(tmp_path)

    return make


def speaker(test, train) -> None:
    test.loc[0, "speaker"] = train["speaker"].iloc[0]


def nobody(test, train) -> None:
    test.loc[0, "speaker"] = ""


def sentence(test, train) -> None:
    test.loc[0, "reference"] = train["text"].iloc[0].upper()


def recording(test, train) -> None:
    """Rename training rows, so that only the recordings are equal."""
    test["speaker"], test["reference"] = "somebody", "en helt annan mening"


@pytest.mark.parametrize(
    ("change", "split", "status", "why"),
    [
        (lambda test, train: None, "test", VALID, "no training clip shares a speaker, sentence, recording with"),
        (nobody, "test", UNVERIFIED, "some clips have no speaker"),
        (speaker, "test", INVALID, "training clips a speaker"),
        (sentence, "test", INVALID, "1 training clips a sentence"),
        (recording, "train", INVALID, "48 training clips a recording"),
        (lambda test, train: None, "validation", INVALID, "selected by 8 utterances of the test set"),
    ],
    ids=["clean", "nobody", "speaker", "sentence", "recording", "chosen"],
)
def test_status_depends_on_training_clips(trained, change, split: str, status: str, why: str):
    found = trained(change, split)
    assert (found.status, why in found.why) == (status, True), found.why


def test_invalid_entry_is_last_and_unranked(trained, tmp_path: Path):
    found = trained(sentence)
    table = sample_reports.evaluation.read_report(Path(found.source)).predictions
    worse = sample_reports.report(
        tmp_path, "worse", sample_reports.wrong(1), table=table.drop(columns=["hypothesis", "wer"])
    )
    listed = board("raw", "worse", runs=tmp_path)
    assert [entry.source for entry in listed.ranked] == [str(worse.folder)]
    assert (listed.invalid[0].wer, listed.ranked[0].wer > 0) == (0, True)
    assert listed.table().index.tolist() == ["1", "-"]
    assert "curation.leaks=drop" in listed.next_step()


# --- cards on the Hub -------------------------------------------------------------------------------------------------

CARD = """---
license: apache-2.0
base_model: openai/whisper-small
{datasets}
model-index:
- name: Whisper Small Sv
  results:
  - task: {{type: automatic-speech-recognition, name: Automatic Speech Recognition}}
    dataset: {{name: Common Voice 11.0, type: mozilla-foundation/common_voice_11_0, config: sv-SE, split: {split}}}
    metrics:
    - {{name: Wer, type: wer, value: {value}}}
---
# Whisper Small Sv
"""
CV_11 = "datasets: [mozilla-foundation/common_voice_11_0]"


@pytest.fixture
def publish(hub_server, tmp_path: Path):
    """Return `publish("me/whisper-sv", card)`, which creates a model repository with that card."""

    def put(name: str, card: str) -> str:
        folder = tmp_path / "cards" / name
        folder.mkdir(parents=True)
        (folder / "README.md").write_text(card, "utf-8")
        hub_server.add("model", name, folder)
        return f"hub://{name}"

    return put


@pytest.mark.parametrize(
    ("datasets", "status", "why"),
    [
        (CV_11, UNVERIFIED, "names mozilla-foundation/common_voice_11_0 as training data, without the split"),
        ("datasets: mozilla-foundation/common_voice_13_0", UNVERIFIED, "names mozilla-foundation/common_voice_13_0"),
        ("", UNVERIFIED, "does not state the training data"),
        ("datasets: [jzju/nst, google/fleurs]", UNVERIFIED, "does not name a normaliser"),
    ],
)
def test_model_card_entry_is_unverified(publish, tmp_path: Path, datasets: str, status: str, why: str):
    (found,) = board(
        publish("me/whisper-sv", CARD.format(datasets=datasets, split="test", value=19.89)), runs=tmp_path
    ).ranked
    assert (found.status, why in found.why) == (status, True), found.why
    assert found.wer == pytest.approx(0.1989)
    assert (found.by, found.base, found.normaliser) == ("me", "openai/whisper-small", "not told")
    assert found.test_set == "mozilla-foundation/common_voice_11_0 sv-SE test"


@pytest.mark.parametrize(("value", "share"), [(19.89, 0.1989), (0.1989, 0.1989), (1.04, 1.04), ("'19.9 %'", 0.199)])
def test_card_wer_is_read_as_fraction_or_per_cent(publish, tmp_path: Path, value, share: float):
    (found,) = board(
        publish("me/whisper-sv", CARD.format(datasets="", split="test", value=value)), runs=tmp_path
    ).ranked
    assert found.wer == pytest.approx(share)


def test_card_and_report_of_other_sets_are_separate(publish, tmp_path: Path):
    sample_reports.report(tmp_path, "raw")
    hub = publish("me/whisper-sv", CARD.format(datasets=CV_11, split="test", value=8))
    found = board("raw", hub, runs=tmp_path)
    assert (len(found.ranked), [entry.by for entry in found.not_comparable]) == (1, ["me"])
    found = board("me/whisper-sv", "raw", runs=tmp_path)
    assert ([entry.by for entry in found.ranked], len(found.not_comparable)) == (["me"], 1)


def test_validation_score_and_broken_card_are_ignored(publish, tmp_path: Path):
    held = publish("me/held", CARD.format(datasets="", split="validation", value=8))
    broken = publish("me/broken", "---\nmodel-index:\n- name: x\n---\nno results\n")
    plain = publish("me/plain", "no front matter at all\n")
    with pytest.raises(LabError, match="found no WER on a test set in hub://me/held, hub://me/broken, hub://me/pl"):
        board(held, broken, plain, runs=tmp_path)


def test_missing_hub_model_raises_one_line_error(hub_server, tmp_path: Path):
    with pytest.raises(LabError, match="the Hub has no hub://me/nothing"):
        board("hub://me/nothing", runs=tmp_path)
    with pytest.raises(LabError, match="no report 'nothing'"):
        board("nothing", runs=tmp_path)


def test_lab_card_and_report_share_one_board(
    publish, toy_settings, toy_cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """`evaluate` writes test set and normaliser to the card, and the leaderboard reads them."""
    recipe = toy_settings({"training.steps": 1, "training.eval_every": 1, "evaluation.max_new_tokens": 3})
    model = training_pipeline.run(recipe, toy_cache, runs=tmp_path / "runs")
    report = experiment_pipeline.evaluate(recipe, toy_cache, model.uri, runs=tmp_path / "runs")
    hub = publish("me/whisper-sv", (Path(model.uri) / "README.md").read_text("utf-8"))
    found = board("toy", hub, runs=tmp_path / "runs")
    ours, theirs = sorted(found.ranked, key=lambda entry: entry.by, reverse=True)
    assert (theirs.by, theirs.wer, theirs.ci95, theirs.n) == ("me", report.score.wer, report.score.ci95, 12)
    assert (ours.status, theirs.status) == (VALID, UNVERIFIED)
    (raw,) = found.not_comparable
    assert (raw.normaliser, raw.wer) == ("none", report.raw.wer)


def card_of(value: object, datasets: str = "some/other", **args: object):
    from huggingface_hub import EvalResult, ModelCardData

    told = {"task_type": "asr", "dataset_type": "x/y", "dataset_name": "y", "dataset_split": "test"}
    results = [EvalResult(**told, metric_type="wer", metric_value=value, metric_args={"normaliser": "1", **args})]
    return ModelCardData(datasets=[datasets], model_name="m", eval_results=results)


@pytest.mark.parametrize("value", [-5, float("nan"), float("inf")])
def test_invalid_wer_value_is_ignored(monkeypatch: pytest.MonkeyPatch, value: float):
    monkeypatch.setattr(hub_client, "read_model_card", lambda uri: card_of(value))
    with pytest.raises(LabError, match="found no WER on a test set"):
        leaderboard.rank(["hub://me/model"])


@pytest.mark.parametrize("ci95", ["narrow", 0.3, [0.1, 0.2, 0.3]])
def test_hostile_card_cannot_break_the_table(monkeypatch: pytest.MonkeyPatch, ci95):
    forged = "some/other\n1     openai/whisper-large  0.010 \x1b[31m"
    monkeypatch.setattr(hub_client, "read_model_card", lambda uri: card_of(0.1, forged, ci95=ci95, n="many"))
    found = leaderboard.rank(["hub://me/model"])
    assert (found.ranked[0].ci95, found.ranked[0].n) == (None, None)
    assert "\x1b" not in str(found) and len(str(found).splitlines()) == 4


# --- the command ------------------------------------------------------------------------------------------------------


def test_leaderboard_command_ranks_and_suggests_next_step(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    def call(*more: str) -> str:
        monkeypatch.setattr(sys, "argv", ["pipelines", "leaderboard", "raw", "best", "--runs", str(tmp_path), *more])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        return capsys.readouterr().out

    sample_reports.report(tmp_path, "raw", sample_reports.wrong(2))
    sample_reports.report(tmp_path, "best", sample_reports.wrong(1))
    lines = call().splitlines()
    assert lines[0].startswith("test set ")
    assert [line.split()[:2] for line in lines[3:5]] == [["1", lines[3].split()[1]], ["2", lines[4].split()[1]]]
    assert lines[3].split()[1].startswith("best-")
    (compared,) = parse(lines[-1])
    assert [Path(report).parents[1].name for report in compared.params["experiments"]] == ["best", "raw"]
    assert compared.params["runs"] == str(tmp_path)
    told = json.loads(call("--json"))
    assert [entry["wer"] < 0.2 for entry in told["ranked"]] == [True, True]
    assert (told["invalid"], told["not_comparable"]) == ([], [])
