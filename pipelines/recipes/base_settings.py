"""The base class of all groups of settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, ValidationError, WrapValidator
from pydantic_core import PydanticCustomError

Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""A seed of NumPy: 0 to 4,294,967,295."""
AUTO = "auto"
"""Value of a setting that is derived from the corpus, see features/derived.py."""


def _allow_auto(value: Any, validate: Callable[[Any], int]) -> Any:
    if value == AUTO:
        return AUTO
    try:
        return validate(value)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].replace("Input should be ", "Input should be 'auto' or ", 1)
        raise PydanticCustomError("or_auto", "{reason}", {"reason": reason}) from None


OR_AUTO = (WrapValidator(_allow_auto), PlainSerializer(lambda value: value, return_type=int | str))
"""Annotations of a number that may also be AUTO."""


def described(choices: str) -> WrapValidator:
    """Return the annotation of a setting with values of several types: an error of it names all `choices`."""

    def validate_with(value: Any, validate: Callable[[Any], Any]) -> Any:
        try:
            return validate(value)
        except ValidationError:
            raise PydanticCustomError("choices", "Input should be {choices}", {"choices": choices}) from None

    return WrapValidator(validate_with)


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
