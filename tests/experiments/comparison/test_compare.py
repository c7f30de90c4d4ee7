"""Comparisons of hand-made reports with known differences, and the compare command."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import sample_reports
from log_recorder import record_log
from pasted import parse

from pipelines import __main__ as cli
from pipelines import recipes
from pipelines.experiments import figures
from pipelines.experiments.comparison import compare as comparison
from pipelines.experiments.comparison import findings, lookup
from pipelines.infra import manifest, plots
from pipelines.infra.errors import LabError
from pipelines.speech import scoring, text


def of_speaker(row) -> int:
    return int(row.speaker[1:])


def of_clip(row) -> int:
    return int(row.id[-1])


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Create reports of three recipes with two seeds: `better` has one error less in twelve words, `same` as many."""
    runs = tmp_path / "runs"
    for seed in (42, 43):
        sample_reports.report(runs, "raw", sample_reports.wrong(lambda row: 2 + of_speaker(row) % 3), seed=seed)
        sample_reports.report(
            runs,
            "better",
            sample_reports.wrong(lambda row: 1 + (of_speaker(row) + of_clip(row)) % 3),
            seed=seed,
            settings={"curation.max_label_cer": 0.6},
            cache="filtered0001",
        )
        sample_reports.report(
            runs, "same", sample_reports.wrong(lambda row: 2 + (of_speaker(row) + of_clip(row)) % 3), seed=seed
        )
    return runs


def compare(*names: object, runs: Path, baseline: str = "") -> comparison.Comparison:
    return comparison.compare([str(name) for name in names], baseline, runs=runs)


def test_reports_of_different_recordings_are_refused(runs: Path, tmp_path: Path):
    frame = sample_reports.rows()
    frame.loc[7, "duration_s"] += 0.5
    sample_reports.report(runs, "elsewhere", sample_reports.wrong(lambda row: 2), table=frame)
    with pytest.raises(LabError, match=r"only reports of the same recordings .* lasts 3\.50 s .* 3\.00 s .*\(1 of 60"):
        compare("raw", "elsewhere", runs=runs)


# --- what was found ---------------------------------------------------------------------------------------------------


def test_verdict_is_better_worse_or_no_difference(runs: Path):
    compared = compare("raw", "better", "same", runs=runs)
    raw, better, same = compared.findings
    assert [finding.experiment.name for finding in compared.findings] == ["raw", "better", "same"]
    assert raw.score.wer == pytest.approx(3 / 12)
    assert better.difference.delta == pytest.approx(-1 / 12)
    assert better.score.ci95[0] < better.score.wer < better.score.ci95[1]
    assert better.difference.ci95[0] <= -1 / 12 <= better.difference.ci95[1] < 0
    assert (raw.verdict, better.verdict) == ("baseline", "better")
    assert better.difference.p < 0.01
    low, high = same.difference.ci95
    assert low < 0 < high
    assert same.difference.p > 0.05
    assert same.verdict == f"no difference shown (one of {1.43 * (high - low) / 2:.3f} would be, four times in five)"
    (_, worse) = compare("raw", runs=runs, baseline="better").findings
    assert (worse.verdict, worse.difference.delta) == ("worse", pytest.approx(1 / 12))


def test_pairing_removes_speaker_difficulty(tmp_path: Path):
    """Speakers differ far more than models; every speaker improves by the same amount."""
    sample_reports.report(tmp_path, "raw", sample_reports.wrong(lambda row: 1 + of_speaker(row) % 9))
    sample_reports.report(tmp_path, "better", sample_reports.wrong(lambda row: of_speaker(row) % 9))
    raw, better = compare("raw", "better", runs=tmp_path).findings
    assert better.score.ci95[1] > raw.score.ci95[0], "the two intervals overlap"
    assert better.difference.ci95 == pytest.approx((-1 / 12, -1 / 12))
    assert better.verdict == "better"


def test_rows_are_paired_by_id_in_any_order(tmp_path: Path):
    table = sample_reports.rows()
    sample_reports.report(tmp_path, "raw", sample_reports.wrong(lambda row: 1 + of_speaker(row) % 9), table=table)
    backwards = table.iloc[::-1].reset_index(drop=True)
    sample_reports.report(tmp_path, "better", sample_reports.wrong(lambda row: of_speaker(row) % 9), table=backwards)
    _, better = compare("raw", "better", runs=tmp_path).findings
    assert better.difference.ci95 == pytest.approx((-1 / 12, -1 / 12))


def test_holm_corrects_p_for_number_of_comparisons():
    assert findings.holm([]) == []
    assert findings.holm([0.03]) == [0.03]
    assert findings.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert findings.holm([0.5, 0.6]) == [1.0, 1.0]


def test_chance_result_among_many_is_not_significant(tmp_path: Path):
    """p = 22 / 1024 is significant alone, but not among six comparisons."""
    worse = [2] * 9 + [1] * 2 + [0]
    sample_reports.report(tmp_path, "raw", sample_reports.wrong(1))
    sample_reports.report(tmp_path, "other", sample_reports.wrong(lambda row: worse[of_speaker(row)]))
    names = []
    for number in range(5):
        names.append(f"more-{number}")
        sample_reports.report(tmp_path, names[-1], sample_reports.wrong(1), settings={"training.steps": 50 + number})
    _, alone = compare("raw", "other", runs=tmp_path).findings
    assert alone.difference.p == pytest.approx(22 / 1024)
    assert (alone.verdict, alone.p_holm) == ("worse", alone.difference.p)
    _, among, *_ = compare("raw", "other", *names, runs=tmp_path).findings
    assert among.difference == alone.difference
    assert among.p_holm == pytest.approx(6 * alone.difference.p)
    assert among.verdict == "no difference shown after correction for the number of comparisons"


def test_few_speakers_give_no_conclusion(tmp_path: Path):
    table = sample_reports.rows(speakers=5)
    sample_reports.report(tmp_path, "raw", sample_reports.wrong(5), table=table)
    sample_reports.report(tmp_path, "better", sample_reports.wrong(0), table=table)
    compared = compare("raw", "better", runs=tmp_path)
    better = compared.findings[1]
    assert better.verdict == "too few speakers for a conclusion: 5"
    assert better.could_show is None
    told = compared.as_dict()["experiments"][1]
    assert [told[name] for name in ("ci95", "delta_ci95", "p", "p_holm")] == [None] * 4
    assert told["delta"] == pytest.approx(-5 / 12)
    assert "at least 6 speakers" in compared.next_step()
    assert plots.png(figures.forest(compared.findings)).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("speaker", "verdict", "who"),
    [
        ("", "no conclusion: speakers unknown", "speakers unknown"),
        ("me", "too few speakers for a conclusion: 1", "1 speaker"),
    ],
)
def test_one_or_unknown_speakers_give_clip_intervals(tmp_path: Path, speaker: str, verdict: str, who: str):
    table = sample_reports.rows().assign(speaker=speaker)
    for name, errors in (("raw", 2), ("better", 1)):
        sample_reports.report(tmp_path, name, sample_reports.wrong(errors), table=table)
    compared = compare("raw", "better", runs=tmp_path)
    better = compared.findings[1]
    assert (better.verdict, better.could_show, better.is_conclusive) == (verdict, None, False)
    told = compared.as_dict()["experiments"][1]
    assert [told[name] for name in ("ci95", "delta_ci95", "p", "p_holm")] == [None] * 4
    assert told["delta_ci95_over_clips"] == pytest.approx((-1 / 12, -1 / 12))
    assert f"60 utterances, {who};" in str(compared)
    assert compared.table().loc["better", "95 % of Δ"].endswith(" over clips")
    assert f"{who}: intervals are over clips and say nothing about other speakers" in compared.notes()
    assert any("on other clips of th" in note and note.endswith(": better") for note in compared.notes())


def test_order_of_experiments_keeps_speakers_and_slices(tmp_path: Path):
    """One cache knows the speakers, another half of them, and only the third knows the gender."""
    known = sample_reports.rows()
    half = known["speaker"].where(known.index % 2 == 0, "")
    tables = {"a": known.drop(columns="gender"), "b": known.assign(speaker=half), "c": known.assign(speaker="")}
    for number, (name, table) in enumerate(tables.items()):
        steps = {"training.steps": number + 5}
        sample_reports.report(tmp_path, name, sample_reports.wrong(number), table=table, settings=steps)
    for pair in ("ab", "ac", "bc"):
        both = [compare(*names, runs=tmp_path) for names in (pair, pair[::-1])]
        assert both[0].units == both[1].units
        assert both[0].units.speakers == 12
        ours, theirs = (one.slices.groupby(["slice", "value"])["speakers"].first().to_dict() for one in both)
        assert ours == theirs


# --- what an experiment is --------------------------------------------------------------------------------------------


def test_runs_with_different_seeds_are_one_experiment(runs: Path):
    raw = compare("raw", "better", runs=runs).baseline
    assert (raw.seeds, len(raw.models)) == ([42, 43], 2)
    every = [report.folder for name in ("raw", "better") for report in lookup.find(name, runs)]
    compared = compare(*reversed(every), runs=runs)
    assert [(finding.experiment.name, finding.experiment.seeds) for finding in compared.findings] == [
        ("better", [42, 43]),
        ("raw", [42, 43]),
    ]


@pytest.mark.parametrize(("label_model", "count"), [("run:raw", 1), ("", 2)])
def test_caches_of_seed_label_models_are_one_experiment(tmp_path: Path, label_model: str, count: int):
    settings = {"curation.max_label_cer": 0.5, "curation.label_model": label_model}
    reports = [sample_reports.report(tmp_path, seed=seed, settings=settings, cache=f"cache{seed}") for seed in (1, 2)]
    assert len(lookup.gather(reports)) == count


def test_experiment_wer_is_mean_over_seeds(tmp_path: Path):
    for seed, errors in ((1, 1), (2, 3)):
        sample_reports.report(tmp_path, "raw", sample_reports.wrong(errors), seed=seed)
        sample_reports.report(
            tmp_path, "better", sample_reports.wrong(errors), seed=seed, settings={"training.steps": 9}
        )
    raw, better = compare("raw", "better", runs=tmp_path).findings
    assert raw.score.wer == pytest.approx(2 / 12)
    low, high = better.difference.ci95
    assert better.difference.delta == 0
    assert low < -1 / 12 < 1 / 12 < high, "the luck of the seeds is in the interval"


def test_run_folder_selects_newest_model_and_logs_rest(runs: Path):
    sample_reports.report(runs, "raw", sample_reports.wrong(9), settings={"training.steps": 7})
    lines = record_log()
    (found,) = lookup.find("raw", runs)
    assert found.lineage["settings"]["training"]["steps"] == 7
    assert "holds 2 older test report(s)" in lines[0]
    sample_reports.report(runs, "raw", sample_reports.wrong(9), tuned=False)
    sample_reports.report(runs, "raw", sample_reports.wrong(9), split="validation", settings={"training.steps": 8})
    assert lookup.find("raw", runs)[0].folder == found.folder


def test_find_accepts_recipe_file_folder_and_report(runs: Path, monkeypatch: pytest.MonkeyPatch):
    (runs / "mine.toml").write_text('name = "raw"')
    monkeypatch.chdir(runs)
    folders = [report.folder for report in lookup.find("raw", runs)]
    for name in (str(runs / "raw"), str(runs / "mine.toml"), "./raw"):
        assert [report.folder.resolve() for report in lookup.find(name, runs)] == folders
    assert [report.folder for report in lookup.find(str(folders[1]), runs)] == folders[1:]


def test_equal_names_get_digests_and_changed_settings(runs: Path):
    other = sample_reports.report(runs, "raw", sample_reports.wrong(1), settings={"training.learning_rate": 3e-4})
    first = lookup.find("better", runs)[0]
    (raw,) = [path for path in (runs / "raw" / "reports").iterdir() if path.name != other.folder.name][:1]
    compared = compare(raw, other.folder, first.folder, runs=runs)
    names = [finding.experiment.name for finding in compared.findings]
    assert names[1:] == [f"raw {other.lineage['digest'][:6]}", "better"]
    assert names[0].startswith("raw ") and names[0] != names[1]
    changed, better = (compared.differences(finding.experiment) for finding in compared.findings[1:])
    assert changed == {"training.learning_rate": [5e-05, 3e-4]}
    assert better == {"curation.max_label_cer": [0.0, 0.6]}


def test_single_experiment_is_compared_with_its_base(tmp_path: Path):
    sample_reports.report(tmp_path, "raw", sample_reports.wrong(1))
    with pytest.raises(
        LabError, match=r"got one: .* evaluate --recipe tour --set name=raw --model openai/whisper-tiny"
    ):
        compare("raw", runs=tmp_path)
    sample_reports.report(tmp_path, "raw", sample_reports.wrong(6), tuned=False)
    compared = compare("raw", runs=tmp_path)
    base, raw = compared.findings
    assert (base.experiment.name, base.experiment.tuned, raw.verdict) == ("openai/whisper-tiny", False, "better")
    assert compared.differences(raw.experiment) == {}


# --- what is refused --------------------------------------------------------------------------------------------------


def test_other_test_set_is_refused_with_report_name(runs: Path):
    table = sample_reports.rows()
    table.loc[3, "reference"] += " och"
    other = sample_reports.report(runs, "other", table=table)
    with pytest.raises(LabError) as caught:
        compare("raw", "better", "other", runs=runs)
    told = str(caught.value)
    assert f"only reports of one test set can be compared: {other.folder} has {other.test_set} (60" in told
    assert "\n" not in told


def test_other_normaliser_is_refused(runs: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text, "NORMALISER", "99")
    other = sample_reports.report(runs, "other")
    with pytest.raises(LabError, match=f"only reports of one normaliser can be compared: {other.folder} has 99"):
        compare("raw", "other", runs=runs)


def test_report_without_test_set_digest_is_refused(runs: Path):
    (old, _) = lookup.find("raw", runs)
    told = json.loads((old.folder / "manifest.json").read_text("utf-8"))
    (old.folder / "manifest.json").write_text(json.dumps({**told, "test_set": ""}), "utf-8")
    with pytest.raises(LabError, match=r"is too old: it does not record what was scored\. Remove that folder"):
        compare(old.folder, "better", runs=runs)


def test_unknown_report_raises_one_line_error(runs: Path, tmp_path: Path):
    with pytest.raises(LabError, match=r"no report 'betr'; did you mean 'better'\?"):
        compare("raw", "betr", runs=runs)
    (tmp_path / "empty").mkdir()
    with pytest.raises(LabError, match="holds no test report of a tuned model"):
        compare(tmp_path / "empty", runs=runs)
    (tmp_path / "empty" / "manifest.json").write_text('{"kind": "model", "files": {}}')
    with pytest.raises(LabError, match="must be the folder of a report, it is that of a model"):
        compare(tmp_path / "empty", runs=runs)


# --- how it is told ---------------------------------------------------------------------------------------------------


def test_slices_show_differences_per_gender(tmp_path: Path):
    sample_reports.report(tmp_path, "raw", sample_reports.wrong(3))
    sample_reports.report(tmp_path, "better", sample_reports.wrong(lambda row: 1 if row.gender == "female" else 3))
    slices = compare("raw", "better", runs=tmp_path).slices.set_index(["value", "experiment"])
    assert set(slices["slice"]) == {"gender"}
    assert slices.loc[("female", "better"), "delta"] == pytest.approx(-2 / 12)
    assert slices.loc[("male", "better"), "delta"] == 0
    assert slices.loc[("female", "better"), "high"] < 0
    assert slices["n"].tolist() == [30] * 4


def test_slice_with_few_speakers_has_no_interval(tmp_path: Path):
    table = sample_reports.rows()
    table["accent"] = ["Skåne" if row.speaker < "s03" else "Uppland" for row in table.itertuples()]
    sample_reports.report(tmp_path, "raw", sample_reports.wrong(3), table=table)
    sample_reports.report(tmp_path, "better", sample_reports.wrong(2), table=table)
    compared = compare("raw", "better", runs=tmp_path)
    accents = compared.slices[compared.slices["slice"] == "accent"].set_index(["value", "experiment"])
    assert pd.isna(accents.loc[("Skåne", "better"), "low"])
    assert not pd.isna(accents.loc[("Uppland", "better"), "low"])
    shown = compared.slice_table()
    assert ("accent", "Skåne") not in shown.index and ("accent", "Uppland") in shown.index


def test_comparison_contains_costs_and_data(runs: Path):
    told = compare("raw", "better", runs=runs).as_dict()
    better = told["experiments"][1]
    assert better["training_seconds"] == [142.5, 143.5]
    assert (better["machines"], better["cache"]) == (["2 CPU threads"], "filtered0001")
    assert better["data"]["train"] == {"clips": 960, "hours": 0.96}
    assert better["differences"] == {"curation.max_label_cer": [0.0, 0.6]}
    assert [Path(report).parts[:2] for report in better["reports"]] == [("better", "reports")] * 2
    assert told["test_set"] == lookup.find("raw", runs)[0].test_set


def test_next_step_depends_on_findings(runs: Path):
    assert "read where better still fails" in compare("raw", "better", runs=runs).next_step()
    assert "larger change" in compare("raw", "same", runs=runs).next_step()
    sample_reports.report(runs, "single", sample_reports.wrong(1))
    assert (
        "train --recipe tour --set name=single --set training.seed=43"
        in compare("raw", "single", runs=runs).next_step()
    )


SETTINGS = {"source.path": "my own/it's $HOME", "source.kind": "folder", "training.steps": 60}


@pytest.mark.parametrize("has_folder", [True, False])
@pytest.mark.parametrize("name", ["tour", "mine"])
def test_pasted_next_step_trains_the_same_recipe(runs: Path, name: str, has_folder: bool):
    recipe = recipes.load("tour", {**SETTINGS, "name": name} if has_folder else {"training.steps": 60, "name": name})
    one = sample_reports.report(runs, name, sample_reports.wrong(1), settings=recipe.settings())
    if has_folder:
        (runs / name / f"train-{one.lineage['digest']}" / "recipe.toml").write_text(recipes.as_toml(recipe))
    *_, train, evaluate, compared = parse(compare("raw", name, runs=runs).next_step())
    seed = {"training": recipe.training.model_copy(update={"seed": 43})}
    assert train.recipe == evaluate.recipe == recipe.model_copy(update=seed)
    assert [command.params["runs"] for command in (train, evaluate, compared)] == [str(runs)] * 3
    assert compared.params["experiments"] == ["raw", name]


def test_pasted_next_step_of_a_fork_forks_again(runs: Path):
    parent = runs / "tour" / "train-1a2b" / "checkpoints" / "checkpoint-3"
    parent.mkdir(parents=True)
    (parent / "model.safetensors").write_bytes(b"weights")
    sha256 = manifest.seal(parent, kind="checkpoint")["files"]["model.safetensors"]["sha256"]
    fork = {"run": "1a2b", "step": 3, "weights_sha256": sha256}
    plain = sample_reports.report(runs, "tour", sample_reports.wrong(2))
    forked = sample_reports.report(runs, "tour", sample_reports.wrong(1), fork=fork)
    *_, train, _, compared = parse(compare(plain.folder, forked.folder, runs=runs, baseline="raw").next_step())
    assert train.params["fork"] == "", "the first experiment with one seed is the plain one"
    *_, train, _, compared = parse(compare(forked.folder, runs=runs, baseline="raw").next_step())
    assert train.params["fork"] == str(parent)
    forks = compare(plain.folder, forked.folder, runs=runs, baseline="raw").changes().loc["fork"]
    assert [json.loads(value) for value in forks] == [None, None, "run 1a2b step 3"]
    assert compared.params["experiments"] == ["raw", "tour"], "the fork is the newest of its recipe"
    shutil.rmtree(parent)
    assert "from run 1a2b step 3 (--fork)" in compare(forked.folder, runs=runs, baseline="raw").next_step()


def test_pasted_command_scores_the_untuned_model(runs: Path):
    with pytest.raises(LabError) as caught:
        compare("better", runs=runs)
    *_, evaluate = parse(str(caught.value).partition("tuned from: ")[2])
    better = lookup.find("better", runs)[0].lineage["settings"]
    assert (evaluate.params["model"], evaluate.params["runs"]) == ("openai/whisper-tiny", str(runs))
    assert evaluate.recipe == recipes.resolve(better, {})


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def call(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, runs: Path):
    """Return `call("raw", "better")`, which runs the command and returns exit code, output and errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pipelines", "compare", *map(str, arguments), "--runs", str(runs)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return (code, *capsys.readouterr())

    return run


def test_compare_command_prints_table_and_writes_files(call, runs: Path, tmp_path: Path):
    code, out, err = call("raw", "better", "same", "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    table = out.split("\n\n")[1].splitlines()
    assert [line.split()[0] for line in table] == ["experiment", "raw", "better", "same"]
    assert "42, 43" in table[2] and "-0.083" in table[2] and table[2].endswith("better")
    assert "no difference shown (one of 0.0" in table[3]
    assert out.splitlines()[-1].startswith("Next: ")
    (changed,) = [line.split() for line in out.splitlines() if line.startswith("curation.")]
    assert changed == ["curation.max_label_cer", "0.0", "0.6", "0.0"]
    written = json.loads((tmp_path / "out" / "comparison.json").read_text("utf-8"))
    picture = (tmp_path / "out" / "comparison.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5_000
    told = json.loads(call("raw", "better", "same", "--json")[1])
    assert {**written, "folder": told["folder"]} == told
    assert Path(told["folder"]).parent == runs / "comparisons"


def test_dry_comparison_writes_nothing(call, runs: Path, tmp_path: Path):
    before = sorted(runs.rglob("*"))
    code, out, _ = call("raw", "better", "--dry-run", "--out", tmp_path / "out")
    assert (code, "would compare raw, better\n" in out) == (0, True)
    assert not (tmp_path / "out").exists()
    assert sorted(runs.rglob("*")) == before


def test_impossible_comparison_prints_one_line(call):
    code, out, err = call("raw", "nothing")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("error: no report 'nothing'. Expected the folder of a report")


def test_seed_label_models_keep_one_experiment(tmp_path: Path):
    asks = {"curation.max_label_cer": 0.4, "curation.label_model": "run:raw"}
    for seed in (42, 43):
        sample_reports.report(tmp_path, "raw", seed=seed, cache="rawcache0001")
        sample_reports.report(tmp_path, "filtered", seed=seed, cache=f"filtered00{seed}", settings=asks)
    compared = comparison.compare(["raw", "filtered"], runs=tmp_path)
    assert [finding.experiment.seeds for finding in compared.findings] == [[42, 43], [42, 43]]
    assert compared.costs().loc["filtered", "cache"] == "filtered0042, filtered0043"


def test_large_p_prevents_conclusion_despite_interval(tmp_path: Path):
    """Five of six speakers improve: p cannot be below 2 / 2^5, however large the difference."""
    table = sample_reports.rows(speakers=6)
    sample_reports.report(tmp_path, "raw", sample_reports.wrong(3), table=table)
    sample_reports.report(
        tmp_path, "five", sample_reports.wrong(lambda row: 3 if row.speaker == "s05" else 1), table=table
    )
    _, five = comparison.compare(["raw", "five"], runs=tmp_path).findings
    assert five.difference.ci95[1] < 0
    assert five.verdict == "no difference shown: p is above 0.05, although the interval excludes 0"


def test_fork_is_not_another_seed(tmp_path: Path):
    sample_reports.report(tmp_path, "raw", seed=42)
    sample_reports.report(tmp_path, "raw", seed=43, fork={"run": "0123456789ab", "step": 4, "weights_sha256": "f" * 64})
    (report,) = lookup.find("raw", tmp_path)
    assert report.lineage["seed"] == 43


def test_base_from_a_local_folder_is_matched(tmp_path: Path):
    """A tuned model does not record the path of its base; the report of the base does."""
    for tuned, place in ((True, "(a local path)"), (False, "/somewhere/my base")):
        made = sample_reports.report(tmp_path, "raw", tuned=tuned).folder / "manifest.json"
        made.write_text(made.read_text().replace('"base": "openai/whisper-tiny', f'"base": "{place}'))
    compared = comparison.compare(["raw"], runs=tmp_path)
    assert [finding.experiment.tuned for finding in compared.findings] == [False, True]


def test_untuned_model_adds_no_seed_variance(tmp_path: Path):
    for seed, errors in ((1, 2), (2, 3)):
        sample_reports.report(tmp_path, "tuned", sample_reports.wrong(errors), seed=seed)
    untuned = sample_reports.report(tmp_path, "base", sample_reports.wrong(6), tuned=False)
    _, found = comparison.compare([str(untuned.folder), "tuned"], runs=tmp_path).findings
    edits = found.experiment.edits
    both = scoring.difference_over_seeds(edits, lookup.gather([untuned])[0].edits)
    assert found.difference.delta == pytest.approx(both.delta)
    ours, theirs = (np.ptp(ci95) for ci95 in (found.difference.ci95, both.ci95))
    assert ours == pytest.approx(theirs * np.sqrt(1 / 2) / np.sqrt(1 / 2 + 1), rel=0.05)


def test_note_counts_utterances_without_speaker(tmp_path: Path):
    table = sample_reports.rows()
    table["speaker"] = table["speaker"].where(table.index >= 5, "")
    for name in ("raw", "other"):
        sample_reports.report(tmp_path, name, table=table, settings={"training.steps": len(name)})
    compared = comparison.compare(["raw", "other"], runs=tmp_path)
    assert any("5 utterances have no speaker: together they count" in note for note in compared.notes())
    assert compared.units.speakers == 11


@pytest.mark.parametrize(
    ("engine", "is_noted"),
    [
        ("", False),
        ("onnxruntime cpu float32", False),
        ("ctranslate2 cpu int8", True),
        ("transformers cuda bfloat16", True),
    ],
)
def test_note_names_models_of_another_precision(tmp_path: Path, engine: str, is_noted: bool):
    sample_reports.report(tmp_path, "raw", engine="transformers cpu float32")
    sample_reports.report(tmp_path, "other", settings={"training.steps": 9}, engine=engine)
    notes = " ".join(comparison.compare(["raw", "other"], runs=tmp_path).notes())
    assert (f"(float32: raw; {engine.rpartition(' ')[2]}: other)" in notes) is is_noted
    assert ("precision" in notes) is is_noted


def test_outdated_normaliser_is_refused(runs: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text, "NORMALISER", "99")
    with pytest.raises(LabError, match="was scored under normaliser 1, this version has 99"):
        compare("raw", "better", runs=runs)


def test_one_name_and_folders_as_paths_are_accepted(tmp_path):
    sample_reports.report(tmp_path, "base", sample_reports.wrong(4), tuned=False)
    other = sample_reports.report(tmp_path, "raw", sample_reports.wrong(3))
    assert [comparison.compare(names, runs=tmp_path).best.name for names in ("raw", other.folder)] == ["raw", "raw"]


@pytest.mark.parametrize("name", [5, None, ""])
def test_experiment_that_is_no_name_is_one_line(tmp_path, name):
    with pytest.raises(LabError, match=r"must be the name of a recipe or a folder, got "):
        comparison.compare([name], runs=tmp_path)
