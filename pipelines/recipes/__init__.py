"""Recipes: the settings of an experiment as one TOML file, with overrides and a digest.

    recipe = recipes.load("tour", overrides={"training.steps": 60})

Unknown settings are refused, with the nearest name as a suggestion, so that a misspelt override never trains the wrong
experiment.
"""

from pipelines.recipes.identity import differences, digest
from pipelines.recipes.loading import RECIPES, load, names, resolve
from pipelines.recipes.schema import is_searchable, is_text_setting, setting_names
from pipelines.recipes.toml_format import as_toml

__all__ = [
    "RECIPES",
    "as_toml",
    "differences",
    "digest",
    "is_searchable",
    "is_text_setting",
    "load",
    "names",
    "resolve",
    "setting_names",
]
