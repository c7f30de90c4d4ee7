"""Hints about learning rates that are far from published ones."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pipelines import recipes
from pipelines.training.optimization import learning_rates

DOCS = Path(__file__).parents[3] / "docs" / "training.md"
WIDTHS = {name: width for width, (name, *_) in learning_rates.PUBLISHED.items()}


@pytest.fixture
def folder_of(tmp_path):
    """`folder_of("small")`: a model's folder with its config.json alone."""

    def make(size: str):
        (tmp_path / "config.json").write_text(json.dumps({"d_model": WIDTHS.get(size, 32)}))
        return tmp_path

    return make


def test_published_rates_grow_with_the_root_of_the_batch():
    assert learning_rates.published(384, 256) == pytest.approx((4e-5, 3e-4))
    assert learning_rates.published(1280, 1024) == pytest.approx((1e-5, 7e-5))
    assert learning_rates.published(32, 8) is None


@pytest.mark.parametrize(
    ("size", "overrides", "hinted"),
    [
        ("tiny", {}, False),
        ("tiny", {"training.learning_rate": 1e-3}, True),
        ("tiny", {"training.learning_rate": 1e-7}, True),
        ("large", {"training.learning_rate": 1e-4}, True),  # the default of the setting
        ("large", {"training.learning_rate": 1e-4, "training.batch_size": 64, "training.accumulation": 8}, False),
        ("large", {"training.learning_rate": 1e-3, "model.adapter": "lora"}, False),
        ("large", {"training.learning_rate": 1e-1, "training.optimizer": "sgd"}, False),
        ("toy", {"training.learning_rate": 1.0}, False),
    ],
)
def test_hint_is_one_line_for_a_rate_far_from_published(folder_of, size, overrides, hinted):
    line = learning_rates.hint(recipes.load("tour", overrides), folder_of(size))
    assert bool(line) == hinted
    assert line == "" or ("\n" not in line and size in line and "training.learning_rate" in line)


@pytest.mark.parametrize("name", recipes.names())
def test_shipped_recipes_get_no_hint(folder_of, name):
    recipe = recipes.load(name)
    size = next(size for size in WIDTHS if size in recipe.model.base)
    assert learning_rates.hint(recipe, folder_of(size)) == ""


def test_table_of_the_docs_has_the_published_rates():
    rows = r"^\| (\w+) \| ([\de-]+) \| ([\de-]+) \| (.*?) \| (.*?) \|$"
    table = re.findall(rows, DOCS.read_text("utf-8"), re.MULTILINE)
    assert [row[0] for row in table] == list(WIDTHS)
    for size, kb, coral, *scaled in table:
        assert (size, float(coral), float(kb)) == learning_rates.PUBLISHED[WIDTHS[size]]
        for clips, cell in zip((8, 16), scaled, strict=True):
            written = [float(number) for number in cell.split(" to ")]
            assert written == pytest.approx(learning_rates.published(WIDTHS[size], clips), rel=0.05)
