"""The base class of all groups of settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, WrapValidator

Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""A seed of NumPy: 0 to 4,294,967,295."""
AUTO = "auto"
"""Value of a setting that is derived from the corpus, see features/derived.py."""


def _allow_auto(value: Any, validate: Callable[[Any], int]) -> Any:
    return AUTO if value == AUTO else validate(value)


OR_AUTO = (WrapValidator(_allow_auto), PlainSerializer(lambda value: value, return_type=int | str))
"""Annotations of a number that may also be AUTO."""


class Settings(BaseModel):
    """A group of settings: frozen, without NaN or infinite numbers; unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return `{"a": {"b": 1}}` as `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
