"""Suggested commands: pasted, they select the same recipe, settings and runs folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from pasted import parse

from pipelines import recipes
from pipelines.recipes.commands import command

TEXT = {"source.kind": "folder", "source.path": '~/own speech/it\'s "mine" $HOME', "name": "mine"}
OVERRIDES = [
    {},
    {"training.steps": 60, "training.learning_rate": 3e-7, "training.fast_dev_run": True},
    TEXT,
    {"source.path": "2024", "source.revision": "true", "source.splits.train": '"quoted"'},
    {"model.adapter": "lora", "model.lora_targets": ["q_proj", "fc1"], "training.tracker": "trackio"},
    {"curation.held_out": ["a, b.csv"], "language": "da"},
    {"source.kind": "mix", "source.parts": [{"name": "a", "kind": "tour", "weight": 0.5, "gives": ["train"]}]},
]


@pytest.mark.parametrize("overrides", OVERRIDES)
def test_command_resolves_to_the_same_recipe(overrides: dict):
    recipe = recipes.load("tour-frozen", overrides)
    (pasted,) = parse(command("train", recipe=recipe, runs="own runs"))
    assert pasted.recipe == recipe
    assert (pasted.params["recipe"], pasted.params["runs"]) == ("tour-frozen", "own runs")


def test_default_runs_folder_is_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LAB_RUNS", str(tmp_path))
    assert command("compare", "a b", runs=tmp_path) == command("compare", "a b") == "python -m pipelines compare 'a b'"


def test_recipe_file_is_named_while_it_exists(tmp_path: Path):
    path = tmp_path / "my own.toml"
    path.write_text('extends = "tour-lora"\nname = "mine"\n[training]\nsteps = 7\n')
    recipe = recipes.load(path, {"training.seed": 3})
    (pasted,) = parse(command("evaluate", recipe=recipe))
    assert (pasted.params["recipe"], list(pasted.params["set_"])) == (str(path), ["training.seed=3"])
    path.unlink()
    (pasted,) = parse(command("evaluate", recipe=recipe))
    assert pasted.recipe == recipe
    assert pasted.params["recipe"] == "tour-lora", "the recipe of the lab with the fewest differences"


def test_edited_recipe_file_still_selects_the_settings(tmp_path: Path):
    path = tmp_path / "own.toml"
    path.write_text('name = "mine"\n[training]\nsteps = 7\n')
    recipe = recipes.load(path)
    path.write_text('name = "other"\n')
    (pasted,) = parse(command("train", recipe=recipe))
    assert pasted.recipe == recipe


def test_every_recipe_of_the_lab_is_named_by_itself():
    for name in recipes.names():
        recipe = recipes.resolve(recipes.load(name).model_dump(mode="json"), {})
        assert command("train", recipe=recipe) == f"python -m pipelines train --recipe {recipe.name}"
