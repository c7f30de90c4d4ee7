"""Load a recipe from its TOML file, with overrides.

    recipe = load("tour", overrides={"training.steps": 60})

A recipe may start from another one: `extends = "planted-checked"` names a recipe of the lab, `extends = "mine.toml"` a
file in the same folder. Its own settings replace those of the recipe that it extends.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipelines.infra.errors import LabError
from pipelines.recipes.base_settings import flatten
from pipelines.recipes.data_settings import PartSettings
from pipelines.recipes.schema import guard_setting_names, search_setting_names, setting_names
from pipelines.recipes.settings import SPACE_PREFIX, Recipe

RECIPES = Path(__file__).parent
"""The folder of the lab's own recipes."""
_EXTENDS = "extends"
_MAX_LINE = 500
"""Characters of an error that quotes a value."""


def names() -> list[str]:
    """Return the names of the lab's own recipes, sorted."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def load(recipe: str | Path = "tour", overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Return the recipe of this name (see `names`) or path, with `overrides` applied.

    `overrides` may be nested, `{"training": {"steps": 60}}`, or dotted, `{"training.steps": 60}`.
    Raises LabError for a recipe that does not exist, an unknown setting, or a value out of range.
    """
    loaded = resolve(_read_with_parents(_path_of(recipe)), overrides or {})
    loaded._origin = str(recipe)
    return loaded


def resolve(settings: Mapping[str, Any], overrides: Mapping[str, Any]) -> Recipe:
    """Return the recipe with these settings, nested or flat, with `overrides` applied. Raises LabError like `load`."""
    if not isinstance(overrides, Mapping):
        raise LabError(f"overrides must be a dictionary such as {{'training.steps': 60}}, got {overrides!r}")
    try:
        flat = {**flatten(settings), **flatten(overrides)}
    except RecursionError:
        raise LabError("the settings are nested too deeply: expected groups of settings, such as [training]") from None
    _refuse_unknown(flat, setting_names() + guard_setting_names(flat) + search_setting_names())
    for name in [name for name in flat if name.endswith("source.parts")]:
        flat[name] = _nest_parts(name, flat[name])
    space = _search_space({name: flat.pop(name) for name in [*flat] if name.startswith(SPACE_PREFIX)})
    nested = _nest(flat)
    if space:
        nested.setdefault("search", {})["space"] = space
    try:
        return Recipe.model_validate(nested)
    except ValidationError as error:
        raise LabError(_first_error(error)) from None


def _path_of(recipe: str | Path, folder: Path = Path()) -> Path:
    """Return the file of a recipe: `folder / recipe` for a path that ends in .toml, else the lab's recipe."""
    return folder / recipe if str(recipe).endswith(".toml") else RECIPES / f"{recipe}.toml"


def _read_with_parents(path: Path) -> dict[str, Any]:
    """Return the flat settings of a recipe's file and of those that it extends. Raises LabError for a cycle."""
    chain, settings = [], {}
    while True:
        chain.append(path.resolve())
        flat = _read(path)
        parent = flat.pop(_EXTENDS, None)
        settings = flat | settings
        if parent is None:
            return settings
        if not isinstance(parent, str):
            raise LabError(f"{path.name}: extends must be the name of one recipe or a .toml file, got {parent!r}")
        child, path = path, _path_of(parent, path.parent)
        if path.resolve() in chain:
            cycle = " -> ".join(link.name for link in [*chain, path])
            raise LabError(f"recipes extend each other in a cycle: {cycle}. Remove one extends")
        if not path.is_file():
            raise LabError(
                f"{child.name} extends the recipe {parent!r}, which does not exist{_suggest(parent, names())}"
            )


def _read(path: Path) -> dict[str, Any]:
    """Return the flat settings of a file."""
    try:
        return flatten(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        name = path.stem if path.parent == RECIPES else str(path)
        raise LabError(
            f"no recipe {name!r}{_suggest(name, names())} "
            f"The lab has {', '.join(names())}; a file of your own ends in .toml"
        ) from None
    except RecursionError:
        raise LabError(f"{path.name} is nested too deeply to be a recipe: name another file") from None
    except ValueError as error:  # also a number of thousands of digits, and text that is not UTF-8
        raise LabError(_shorten(f"{path.name} is not valid TOML: {error}")) from None
    except OSError as error:
        raise LabError(f"{path.name} must be a readable file, got: {error.strerror}. Name another") from None


def _search_space(flat: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return `search.space.training.steps.low` and the like, grouped by the searched setting."""
    space: dict[str, dict[str, Any]] = {}
    for name, value in flat.items():
        setting, _, leaf = name.removeprefix(SPACE_PREFIX).rpartition(".")
        space.setdefault(setting, {})[leaf] = value
    return space


def _nest_parts(name: str, parts: Any) -> list[dict[str, Any]]:
    """Return the parts of a mix as nested dictionaries. Raises LabError for an unknown setting in one of them."""
    if not isinstance(parts, list | tuple) or not all(isinstance(part, Mapping) for part in parts):
        raise LabError(f"setting {name}: must be a list of tables such as [[{name}]], got {parts!r}")
    flat_parts = [flatten(part) for part in parts]
    for number, part in enumerate(flat_parts):
        prefix = f"{name}.{number}."
        _refuse_unknown({prefix + setting: "" for setting in part}, setting_names(PartSettings, prefix))
    return [_nest(part) for part in flat_parts]


def _refuse_unknown(flat: Mapping[str, Any], valid_names: list[str]) -> None:
    for name in flat:
        if name == _EXTENDS:
            raise LabError("extends is read from a recipe's file only: write it there, above the first table")
        if name not in valid_names:
            raise LabError(
                f"unknown setting {_shorten(repr(name))}{_suggest(name, valid_names)} "
                "All settings: python -m pipelines recipe tour"
            )


def _suggest(word: str, valid_names: list[str]) -> str:
    """Return `; did you mean 'x'?` with the nearest name, compared as a whole or by its last part; else a full stop."""
    members = [name for name in valid_names if name.startswith(f"{word}.")]
    if members:
        return f": it is a group, name one of its settings, such as {members[0]!r}."
    near = difflib.get_close_matches(word, valid_names, n=1, cutoff=0.6)
    by_last_part = {name.rsplit(".", 1)[-1]: name for name in valid_names}
    matches = difflib.get_close_matches(word.rsplit(".", 1)[-1], by_last_part, n=1)
    near = near or [by_last_part[match] for match in matches]
    return f"; did you mean {near[0]!r}?" if near else "."


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return `{"a.b": 1}` as `{"a": {"b": 1}}`."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *groups, leaf = name.split(".")
        inner = nested
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[leaf] = value
    return nested


def _first_error(error: ValidationError) -> str:
    """Return the first error of a validation as one line."""
    first = error.errors()[0]
    setting = ".".join(str(part) for part in first["loc"]) or "recipe"
    return _shorten(f"setting {setting}: {first['msg']}, got {first['input']!r}")


def _shorten(line: str) -> str:
    return line if len(line) <= _MAX_LINE else line[:_MAX_LINE] + " ..."
