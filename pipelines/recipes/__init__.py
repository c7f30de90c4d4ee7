"""An experiment as frozen, typed settings: one TOML file, overrides on top, and a digest that names the result.

    recipe = load("tour", overrides={"training.steps": 60})

Unknown names raise and suggest the nearest one: a misspelt override must never train the wrong experiment.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipelines.infra.errors import LabError
from pipelines.recipes.settings import (
    _SPACE,
    ParameterSettings,
    PartSettings,
    Recipe,
    SearchSettings,
    Settings,
    SourceSettings,
    flatten,
)

RECIPES = Path(__file__).parent


SourceSettings.model_rebuild()


def names() -> list[str]:
    """The recipes that come with the lab."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def load(recipe: str | Path = "tour", overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe by name (see `names`) or by path, and lay `overrides` over it.

    `overrides` may be nested, `{"training": {"steps": 60}}`, or dotted, `{"training.steps": 60}`.
    Raises LabError for a recipe that does not exist, a name it does not know, or a value out of range.
    """
    return resolve({**_read(recipe)}, overrides or {})


def resolve(settings: Mapping[str, Any], overrides: Mapping[str, Any]) -> Recipe:
    """The recipe made of `settings` (nested) with `overrides` laid over them."""
    if not isinstance(overrides, Mapping):
        raise LabError(f"overrides must be a dictionary such as {{'training.steps': 60}}, got {overrides!r}")
    flat = {**flatten(settings), **flatten(overrides)}
    _refuse_unknown(flat, known_names() + _search_names())
    flat |= {name: _parts(name, value) for name, value in flat.items() if name == "source.parts"}
    space = _space({name: flat.pop(name) for name in [*flat] if name.startswith(_SPACE)})
    nested = _nest(flat)
    if space:
        nested.setdefault("search", {})["space"] = space
    try:
        return Recipe.model_validate(nested)
    except ValidationError as error:
        raise LabError(_in_one_line(error)) from None


def digest(identity: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that name everything in `identity` (JSON values only)."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:12]


def differences(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """One line for each field in which two identities differ, sorted by name."""
    fields = sorted(wanted.keys() | found.keys())
    return [
        f"{name}: wanted {wanted.get(name, 'nothing')}, found {found.get(name, 'nothing')}"
        for name in fields
        if wanted.get(name) != found.get(name)
    ]


def as_toml(recipe: Recipe, opening: str = "") -> str:
    """The recipe as the file that `load` reads, every setting told; `opening` goes before it as a comment.

    The search is told where there is one.
    """
    groups: dict[str, list[str]] = {}
    for name, value in recipe.settings().items():
        group, _, leaf = name.rpartition(".")
        groups.setdefault(group, []).append(f"{leaf} = {_toml(value)}")
    if recipe.search.space:
        for name, value in search_settings(recipe).items():
            group, _, leaf = name.rpartition(".")
            groups.setdefault(group, []).append(f"{leaf} = {_toml(value)}")
    comment = [f"# {line}".rstrip() for line in opening.splitlines()]
    tables = ["\n".join([*([f"[{group}]"] if group else []), *lines]) for group, lines in groups.items()]
    return "\n\n".join([*(["\n".join(comment)] if comment else []), *tables]) + "\n"


def search_settings(recipe: Recipe) -> dict[str, Any]:
    """What `Recipe.settings` leaves out: the search as a flat dictionary."""
    told = flatten({"search": recipe.search.model_dump(mode="json", exclude_none=True)})
    return {name: value for name, value in told.items() if not (name.startswith(_SPACE) and value == [])}


def known_names(settings: type[Settings] | None = None, prefix: str = "") -> list[str]:
    """Every setting of a run, dotted: `training.steps`, ...; those of one group with `prefix` before them."""
    names: list[str] = []
    for name, field in (settings or Recipe).model_fields.items():
        if field.exclude:
            continue
        group = field.annotation
        names += known_names(group, f"{prefix}{name}.") if _is_group(group) else [f"{prefix}{name}"]
    return names


def takes_text(name: str) -> bool:
    """Whether the setting with this dotted name is a string, so that `2024` is the text and not the number."""
    kind: Any = Recipe
    for part in name.split("."):
        field = kind.model_fields.get(part) if _is_group(kind) else None
        if field is None:
            return False
        kind = field.annotation
    return kind is str


def searchable(name: str) -> bool:
    """Whether a sweep may set this setting: not the name, not a mix's parts, and nothing that is the measure."""
    return name not in ("name", "source.parts", "training.fast_dev_run") and not name.startswith("evaluation.")


def _search_names() -> list[str]:
    """The settings of the search, those of every setting that may be searched included."""
    plain = [name for name in known_names(SearchSettings, "search.") if f"{name}." != _SPACE]
    inner = known_names(ParameterSettings)
    return plain + [f"{_SPACE}{name}.{leaf}" for name in known_names() if searchable(name) for leaf in inner]


def _space(flat: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`search.space.training.steps.low` and its like, by the settings that they are about."""
    space: dict[str, dict[str, Any]] = {}
    for name, value in flat.items():
        setting, _, leaf = name.removeprefix(_SPACE).rpartition(".")
        space.setdefault(setting, {})[leaf] = value
    return space


def _toml(value: Any) -> str:
    """A value as TOML writes it; JSON's strings and numbers are TOML's."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{name} = {_toml(inner)}" for name, inner in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def _is_group(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Settings)


def _read(recipe: str | Path) -> dict[str, Any]:
    path = Path(recipe) if str(recipe).endswith(".toml") else RECIPES / f"{recipe}.toml"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LabError(
            f"no recipe {str(recipe)!r}{_suggest(str(recipe), names())} "
            f"The lab has {', '.join(names())}; a file of your own ends in .toml"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise LabError(f"{path.name} is not valid TOML: {error}") from None
    except OSError as error:
        raise LabError(f"{path.name} must be a readable file, got: {error.strerror}. Name another") from None


def _parts(name: str, parts: Any) -> Any:
    """The parts of a mix, nested again; a misspelt name in one of them is refused like any other."""
    if not isinstance(parts, list | tuple) or not all(isinstance(part, Mapping) for part in parts):
        raise LabError(f"setting {name}: must be a list of tables such as [[{name}]], got {parts!r}")
    flat = [flatten(part) for part in parts]
    known = known_names(PartSettings)
    for number, part in enumerate(flat):
        within = f"{name}.{number}."
        _refuse_unknown({within + inner: "" for inner in part}, [within + inner for inner in known])
    return [_nest(part) for part in flat]


def _refuse_unknown(flat: Mapping[str, Any], known: list[str]) -> None:
    for name in flat:
        if name not in known:
            raise LabError(
                f"unknown setting {name!r}{_suggest(name, known)} All settings: python -m pipelines recipe tour"
            )


def _suggest(word: str, known: list[str]) -> str:
    """`; did you mean 'x'?`, or a full stop where nothing is near; a bare last part is looked up, too."""
    if any(name.startswith(f"{word}.") for name in known):
        return f": it is a group, name one of its settings, such as {next(n for n in known if n.startswith(word))!r}."
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    tails = {name.rsplit(".", 1)[-1]: name for name in known}
    near = near or [tails[tail] for tail in difflib.get_close_matches(word.rsplit(".", 1)[-1], tails, n=1)]
    return f"; did you mean {near[0]!r}?" if near else "."


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *groups, leaf = name.split(".")
        inner = nested
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[leaf] = value
    return nested


def _in_one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "recipe"
    return f"setting {where}: {first['msg']}, got {first['input']!r}"
