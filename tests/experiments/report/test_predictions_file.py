from __future__ import annotations

import csv

import pandas as pd
import pytest

from pipelines.experiments.report import predictions_file


@pytest.mark.parametrize(
    "text", ["=HYPERLINK(1)", "+46 70", "-nej", "@SUM", "'=a", "\t=a", "007", "hej; =1", "a=b", ""]
)
def test_text_is_read_back_and_is_no_formula(tmp_path, text):
    table = pd.DataFrame({"id": [text], "reference": ["-1"], "hypothesis": [text], "wer": [-0.5], "tokens": [3]})
    predictions_file.write(tmp_path, table)
    pd.testing.assert_frame_equal(predictions_file.read(tmp_path), table)
    with open(tmp_path / "predictions.csv", newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert not row["id"].startswith(("=", "+", "-", "@", "\t")) and row["wer"] == "-0.5"
