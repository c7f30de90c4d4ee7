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
