"""Settings that are derived from the corpus: `auto` becomes a number that fits, explicit values win."""

from __future__ import annotations

from types import SimpleNamespace

import pandas as pd
import pytest

from pipelines import recipes
from pipelines.features import derived
from pipelines.infra.errors import LabError


def cache_of(n: int, duration_s: float = 4.0, tokens: int = 20, test_tokens: int = 20) -> SimpleNamespace:
    """Return the parts of a cache that are read: `n` training clips, four for validation and four for the test."""
    splits = ["train"] * n + ["validation"] * 4 + ["test"] * 4
    counts = [tokens + derived.PROMPT_TOKENS] * (n + 4) + [test_tokens + derived.PROMPT_TOKENS] * 4
    rows = pd.DataFrame({"split": splits, "duration_s": duration_s, "label_count": counts})
    return SimpleNamespace(
        rows=rows, folder="cache", split=lambda name: (rows["split"] == name).to_numpy().nonzero()[0]
    )


@pytest.mark.parametrize(("n", "steps"), [(1, 100), (20, 100), (412, 312), (2_385, 1_794), (100_000, 4_000)])
def test_steps_follow_the_clips_within_bounds(n, steps):
    found = derived.derive(recipes.load("own"), cache_of(n))
    training = found.recipe.training
    assert training.steps == found.values["training.steps"] == steps
    assert training.steps // training.eval_every >= 8
    assert training.patience * training.eval_every < training.steps
    assert training.warmup_steps <= training.steps // 10
    assert recipes.resolve(found.recipe.settings(), {}) == found.recipe
    assert f"derived from {n:,} training clips: training.steps {steps:,}, " in str(found)


def test_explicit_settings_win_and_count_for_the_others():
    recipe = recipes.load("own", {"training.steps": 40, "training.patience": 0, "evaluation.max_new_tokens": 99})
    found = derived.derive(recipe, cache_of(412))
    assert found.values == {"training.eval_every": 4, "training.warmup_steps": 4}
    assert (found.recipe.training.patience, found.recipe.evaluation.max_new_tokens) == (0, 99)
    assert derived.derive(recipes.load("tour"), cache_of(9)) == derived.Derived(recipes.load("tour"), {}, 9)


@pytest.mark.parametrize(
    ("cache", "limit"),
    [
        (cache_of(9, 4.0), 64),
        (cache_of(9, 24.0, 138), 304),
        (cache_of(9, 30.0), 376),
        (cache_of(9, 10.0, 300), 375),
        (cache_of(9, 30.0, 440), 440),
        (cache_of(9, 4.0, 20, 300), 64),
    ],
)
def test_token_limit_fits_the_longest_clip(cache, limit):
    """24 s of Swedish have 121 to 138 tokens. Transcripts of the test split do not count."""
    assert derived.token_limit(cache) == limit


def test_cut_references_and_hypotheses_are_counted():
    note = derived.cut_references(cache_of(9, 24.0, 138), "validation", 64)
    assert note.startswith("4 of 4 validation transcripts have more tokens (up to 138) than")
    assert derived.cut_references(cache_of(9, 24.0, 138), "validation", 138) == ""
    assert derived.cut_hypotheses(3, "test").startswith("3 test hypotheses were cut at evaluation.max_new_tokens")
    assert derived.cut_hypotheses(1, "test").startswith("1 test hypothesis was cut at evaluation.max_new_tokens")
    assert derived.cut_hypotheses(0, "test") == ""


def test_cache_without_training_clips_is_a_one_line_error():
    with pytest.raises(LabError, match="has no train clips to derive training.steps from"):
        derived.derive(recipes.load("own"), cache_of(0))
