"""Tables and plots of notebook 02's scores."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import sample_reports

from pipelines.experiments import figures
from pipelines.training.callbacks import samples


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    worse = sample_reports.wrong(lambda row: int(row.speaker[1:]) % 7)
    return {
        "before": sample_reports.report(runs, "base", sample_reports.wrong(9), tuned=False),
        "after": sample_reports.report(runs, "raw", worse),
    }


@pytest.mark.parametrize(
    ("reference", "hypothesis", "shown"),
    [
        ("Hej på dig.", "Hej på dig!", "Hej på dig!"),
        ("Hej på dig.", "hej då dig", "hej [då] dig"),
        ("Hej på dig.", "Hej dig.", "Hej […] dig."),
        ("Hej på dig.", "Hej på på dig.", "Hej [på] på dig."),
        ("Kvällsmat nu.", "Kvälls mat nu.", "[Kvälls mat] nu."),
        ("Hej.", "<b>hej", "[b] hej"),
        ("Hej.", "", "[…]"),
        ("Hej.", 99 * "he", f"[{16 * 'he'}…]"),
        ("Tre till fyra.", "Tre – fyra", "tre […] fyra"),
    ],
)
def test_words_that_differ_are_marked(reference: str, hypothesis: str, shown: str):
    marked = figures._marked(reference, hypothesis)
    assert marked.replace(f"<mark style='{figures._MARK}'>", "[").replace("</mark>", "]") == shown


def test_speakers_are_in_the_order_of_the_last_report(reports):
    (axes,) = figures.speakers(reports).axes
    before, after = (line for line in axes.lines if line.get_marker() == "o")
    assert list(after.get_xdata()) == sorted(after.get_xdata(), reverse=True)
    assert set(before.get_xdata()) == {9 / 12}
    assert len(after.get_xdata()) == 12


def test_worst_errors_are_beside_the_base_models(reports, toy_settings):
    shown = figures.side_by_side(toy_settings(), reports["before"], reports["after"], n=3).data
    assert shown.count("<tr>") == 1 + 3
    assert shown.count("<mark") == 3 * 9
    assert "Some clips have no sound" in shown, "the ids are not in the source"


def test_scores_fit_into_their_cells(reports):
    table = figures.score_table(reports)
    assert table.map(lambda cell: len(str(cell))).to_numpy().max() <= 50, "pandas cuts longer cells"
    assert table.loc["after", "WER, stock pipeline"] == "not scored"


def test_samples_are_shown_by_step(tmp_path, toy_cache):
    rows = toy_cache.rows[toy_cache.rows["split"] == "validation"]
    for step in (4, 8):
        samples.append(tmp_path, step, rows["id"].tolist(), ["fel", *rows["text"].tolist()[1:]])
    shown = figures.samples(SimpleNamespace(uri=str(tmp_path / "model")), toy_cache).data
    assert shown.count("<tr>") == 1 + samples.CLIPS
    assert "step 4" in shown and "step 8" in shown
    assert rows["text"].iloc[0] in shown


def test_model_from_another_machine_has_no_samples(tmp_path, toy_cache):
    shown = figures.samples(SimpleNamespace(uri=str(tmp_path / "model")), toy_cache).data
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
