"""The dotted names of all settings, and what kind of value each takes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pipelines.recipes.base_settings import Settings
from pipelines.recipes.data_settings import GuardSettings
from pipelines.recipes.search_settings import ParameterSettings, SearchSettings
from pipelines.recipes.settings import SPACE_PREFIX, Recipe

_GUARDS = "guards"


def setting_names(group: type[Settings] = Recipe, prefix: str = "") -> list[str]:
    """Return the dotted names of a group's settings, without the search; `prefix` is put before each."""
    names: list[str] = []
    for name, field in group.model_fields.items():
        if field.exclude or name == _GUARDS:
            continue
        inner = field.annotation
        names += setting_names(inner, f"{prefix}{name}.") if _is_group(inner) else [f"{prefix}{name}"]
    return names


def guard_setting_names(names: Iterable[str]) -> list[str]:
    """Return the dotted names of the settings of those guards that occur in `names`, or of an example if none does."""
    guards = dict.fromkeys(name.split(".")[1] for name in names if name.startswith(f"{_GUARDS}.")) or ("NAME",)
    return [name for guard in guards for name in setting_names(GuardSettings, f"{_GUARDS}.{guard}.")]


def search_setting_names() -> list[str]:
    """Return the dotted names of the search's settings, including those of every setting that can be searched."""
    plain = [name for name in setting_names(SearchSettings, "search.") if f"{name}." != SPACE_PREFIX]
    fields = setting_names(ParameterSettings)
    searchable = [name for name in setting_names() if is_searchable(name)]
    return plain + [f"{SPACE_PREFIX}{name}.{field}" for name in searchable for field in fields]


def is_searchable(name: str) -> bool:
    """Return True if a sweep may set this setting: it is no name, no list of parts and not part of the evaluation."""
    return name not in ("name", "source.parts", "training.fast_dev_run") and not name.startswith("evaluation.")


def is_text_setting(name: str) -> bool:
    """Return True if the setting is a string: `2024` then means the text and not the number."""
    annotation: Any = Recipe
    if name.startswith(f"{_GUARDS}."):
        annotation, name = GuardSettings, name.partition(".")[2].partition(".")[2]
    for part in name.split("."):
        field = annotation.model_fields.get(part) if _is_group(annotation) else None
        if field is None:
            return False
        annotation = field.annotation
    return annotation is str


def _is_group(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Settings)
