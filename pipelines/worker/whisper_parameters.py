"""The parameters that clients may send to the Whisper worker, and their checks."""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipelines.infra.errors import LabError
from pipelines.worker.interface import Parameter

FORM_FIELDS = {
    "dataset": ("dataset", "language"),
    "train": ("epochs", "learning_rate", "warmup_ratio"),
    "eval": ("split",),
    "test": ("audio",),
    "save": ("store", "name"),
}
"""Parameters in the page's form of each task. A client may send one set of parameters to all tasks."""
TASK_PARAMETERS = {
    "dataset": ("dataset", "language"),
    "train": ("dataset", "language", "epochs", "learning_rate", "warmup_ratio"),
    "eval": ("dataset", "language", "split"),
    "test": ("language", "audio"),
    "save": ("store", "name"),
}
"""Parameters that each task runs with."""


class Parameters(BaseModel):
    """Parameters of all tasks, with their limits and descriptions."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    epochs: float = Field(1.0, gt=0, le=1_000, description="how often every training clip is seen")
    learning_rate: float = Field(1e-5, gt=0, le=1, description="the highest, after the warm-up")
    warmup_ratio: float = Field(0.25, ge=0, le=1, description="share of the steps over which the rate rises")
    dataset: str = Field("", max_length=64, description="what to tune and score on")
    language: str = Field("", max_length=64, description="the language, such as sv or Swedish")
    split: Literal["test", "validation"] = Field("test", description="what is scored")
    store: str = Field("", max_length=64, description="where the model is saved")
    name: str = Field(
        "",
        pattern=r"^([a-z0-9][a-z0-9_-]*(\.[a-z0-9_-]+)*)?$",
        max_length=64,
        description="its name there; empty: the model's own",
    )
    audio: str | bytes = Field("", description="the recording: a file, in JSON its bytes as base64")


def settings_of(params: Mapping[str, Any], steps_per_epoch: int) -> dict[str, Any]:
    """Return the recipe's settings for epochs, learning_rate and warmup_ratio; steps are rounded up."""
    steps = max(1, math.ceil(params["epochs"] * steps_per_epoch))
    return {
        "training.steps": steps,
        "training.learning_rate": params["learning_rate"],
        "training.warmup_steps": math.ceil(params["warmup_ratio"] * steps),
    }


def validate(params: Mapping[str, Any]) -> Parameters:
    """Return the parsed parameters; raise LabError with the first fault."""
    try:
        return Parameters.model_validate(params)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])[:40]
        if first["type"] == "extra_forbidden":
            raise LabError(f"there is no parameter {name!r}; there are {', '.join(Parameters.model_fields)}") from None
        expected = "small letters a to z, digits, -, _ and single dots" if name == "name" else first["msg"]
        raise LabError(f"{name}: {expected}") from None


def require_one_of(what: str, name: str, allowed: Mapping[str, Any] | tuple[str, ...]) -> str:
    """Return `name` if it is allowed, else raise LabError."""
    if name not in allowed:
        raise LabError(f"{what} must be one of {', '.join(allowed)}: others are not offered by this worker")
    return name


def choose(what: str, requested: str, prepared: str | None, allowed: Mapping[str, Any] | tuple[str, ...]) -> str:
    """Return the requested name, else the prepared one, else the first allowed; raise LabError if it is not allowed."""
    return require_one_of(what, requested or (prepared if prepared in allowed else "") or next(iter(allowed)), allowed)


def decode_audio(audio: str | bytes) -> bytes:
    """Return the bytes of a recording, which in JSON is base64. Raises LabError if it is missing or not base64."""
    if isinstance(audio, str):
        try:
            audio = base64.b64decode(re.sub(r"^data:[\w/;=.+-]*,|\s+", "", audio), validate=True)
        except (binascii.Error, ValueError):
            raise LabError("audio must be a file's bytes as base64, or a file in a form") from None
    if not audio:
        raise LabError("audio is missing: send a file's bytes as base64, or a file in a form")
    return audio


def form_field(name: str, choices: tuple[str, ...]) -> Parameter:
    """Return a parameter as a field of the page's form."""
    field = Parameters.model_fields[name]
    kind = "file" if name == "audio" else "number" if field.annotation is float else "text"
    default = choices[0] if choices else None if kind == "file" else field.default
    return Parameter(name, field.description, default, kind, choices)
