"""Plots and tables of scores."""

from __future__ import annotations

import pytest
import sample_reports

from pipelines.experiments import figures


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    worse = sample_reports.wrong(lambda row: int(row.speaker[1:]) % 7)
    return {
        "before": sample_reports.report(runs, "base", sample_reports.wrong(9), tuned=False),
        "after": sample_reports.report(runs, "raw", worse),
    }


def test_speakers_are_in_the_order_of_the_last_report(reports):
    (axes,) = figures.speakers(reports).axes
    before, after = (line for line in axes.lines if line.get_marker() == "o")
    assert list(after.get_xdata()) == sorted(after.get_xdata(), reverse=True)
    assert set(before.get_xdata()) == {9 / 12}
    assert len(after.get_xdata()) == 12


def test_scores_fit_into_their_cells(reports):
    table = figures.score_table(reports)
    assert table.map(lambda cell: len(str(cell))).to_numpy().max() <= 50, "pandas cuts longer cells"
    assert table.loc["after", "WER, stock pipeline"] == "not scored"


def test_slices_are_drawn_with_intervals_in_the_order_of_the_table(reports):
    (axes,) = figures.slice_figure(reports["after"]).axes
    table = reports["after"].slices()
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[::-1] == (table["slice"] + ": " + table["value"].replace("", "not told")).tolist()
    (dots,) = (line for line in axes.lines if line.get_marker() == "o")
    assert list(dots.get_xdata())[::-1] == table["wer"].tolist()


def test_power_is_five_percent_of_nothing_and_eighty_of_the_detectable():
    (axes,) = figures.power_curve(0.03, -0.006).axes
    sizes, power = axes.lines[0].get_data()
    assert power[0] == pytest.approx(0.05)
    assert dict(zip(sizes, power, strict=True))[0.03] == pytest.approx(0.8, abs=1e-3)
    assert axes.lines[-1].get_xdata() == [0.006, 0.006], "the measured difference, without its sign"
