"""Tables of transcripts: the worst of two models, and those of a few clips at each validation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import sample_reports

from pipelines.experiments import figures
from pipelines.experiments.figures import texts
from pipelines.training.callbacks import samples


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    worse = sample_reports.wrong(lambda row: int(row.speaker[1:]) % 7)
    return {
        "before": sample_reports.report(runs, "base", sample_reports.wrong(9), tuned=False),
        "after": sample_reports.report(runs, "raw", worse),
    }


def test_worst_errors_are_beside_the_base_models(reports, toy_settings):
    shown = figures.side_by_side(toy_settings(), reports["before"], reports["after"], n=3).data
    assert shown.count("<tr>") == 1 + 3
    assert shown.count("<mark") == 3 * 9
    assert "Some clips have no sound" in shown, "the ids are not in the source"


def trained(folder: Path, *history: dict[str, float]) -> SimpleNamespace:
    """Return a model whose run is `folder`, with as many fields as the player reads."""
    return SimpleNamespace(uri=str(folder / "model"), history=list(history))


def test_samples_are_shown_by_step(tmp_path, toy_cache):
    rows = toy_cache.rows[toy_cache.rows["split"] == "validation"]
    for step in (0, 4, 8):
        samples.add(tmp_path, step, rows["id"].tolist(), ["<i>fel", *rows["text"].tolist()[1:]])
    shown = figures.samples(trained(tmp_path, {"step": 4, "eval_wer": 0.4567}), toy_cache).data
    assert shown.count("<tbody>") == samples.CLIPS + 1, "one part for each clip, and their sum"
    assert shown.count("data-step='4'") == samples.CLIPS + 1
    assert rows["text"].iloc[0] in shown
    assert "<mark" in shown and "<i>" not in shown
    assert shown.count("WER of all validation clips 0.457") == 1


def test_bar_has_the_share_of_right_words():
    line = texts._sum_line([("Hej på dig.", "hej då dig"), ("Ja.", "ja")], None)
    assert line == f"{'█' * 15}{'░' * 5} 3 of 4"


def test_model_from_another_machine_has_no_samples(tmp_path, toy_cache):
    shown = figures.samples(trained(tmp_path), toy_cache).data
    assert "There are no texts" in shown


@pytest.mark.parametrize("source", [{"kind": "newer"}, {"kind": "tour", "newer": 1}, {"kind": "mix"}])
def test_errors_of_a_source_of_another_version_have_no_sound(reports, source):
    after = replace(reports["after"], lineage={**reports["after"].lineage, "settings": {"source": source}})
    findings = [
        SimpleNamespace(
            experiment=SimpleNamespace(name=name, reports=(report,), lineages=[report.lineage], tuned=name == "after"),
            score=report.score,
        )
        for name, report in (("before", reports["before"]), ("after", after))
    ]
    shown = figures.compared_errors(findings, 2).data
    assert shown.count("<tr>") == 1 + 2
    assert "does not know the source" in shown
