"""Recipes as TOML files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pipelines.recipes.settings import Recipe


def as_toml(recipe: Recipe, comment: str = "") -> str:
    """Return the recipe as a TOML file with every setting, and the search if there is one.

    `comment` (plain lines) becomes a comment at the top.
    """
    settings = recipe.settings() | (recipe.search_settings() if recipe.search.space else {})
    groups: dict[str, list[str]] = {}
    for name, value in settings.items():
        group, _, leaf = name.rpartition(".")
        groups.setdefault(group, []).append(f"{leaf} = {_format_value(value)}")
    comment_lines = [f"# {line}".rstrip() for line in comment.splitlines()]
    tables = ["\n".join([*([f"[{group}]"] if group else []), *lines]) for group, lines in groups.items()]
    return "\n\n".join([*(["\n".join(comment_lines)] if comment_lines else []), *tables]) + "\n"


def _format_value(value: Any) -> str:
    """Return a value in TOML syntax. JSON's strings and numbers are valid TOML."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{name} = {_format_value(inner)}" for name, inner in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_format_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
