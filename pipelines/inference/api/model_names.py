"""Names of models that requests may use: the served model's, those that clients send by default, the operator's."""

from __future__ import annotations

import re
from collections.abc import Iterable

from pipelines.inference import pipeline as inference_pipeline
from pipelines.inference.http.guard import Refusal
from pipelines.infra.errors import LabError
from pipelines.whisper.model import ModelRef

DEFAULT = "whisper-1"
"""OpenAI's name for Whisper, which many clients send by default."""
ALIASES = (
    DEFAULT,
    "gpt-transcribe",
    "gpt-4o-transcribe",
    "gpt-4o-mini-transcribe",
    "gpt-4o-mini-transcribe-2025-12-15",
    "gpt-realtime-whisper",
    "whisper-large-v3",
    "whisper-large-v3-turbo",
    "openai/whisper-large-v3",
    "openai/whisper-large-v3-turbo",
    "Systran/faster-whisper-small",
    "Systran/faster-whisper-medium",
    "Systran/faster-whisper-large-v3",
    "deepdml/faster-whisper-large-v3-turbo-ct2",
)
"""Names that clients of OpenAI, Groq, vLLM and faster-whisper servers send unless they are told another one."""


class ModelNames:
    """The names that this server accepts for its one model."""

    def __init__(self, ref: ModelRef, aliases: Iterable[str] = ()):
        self.served = model_name(ref)
        self.accepted = tuple(dict.fromkeys([self.served, *aliases, *ALIASES]))

    def check(self, name: str, param: str = "model") -> None:
        """Raise Refusal (404) for any other name."""
        if name not in self.accepted:
            raise Refusal(
                404,
                f"this server does not serve that model; it accepts {', '.join(self.accepted)}",
                "model_not_found",
                param=param,
            )


def model_name(ref: ModelRef) -> str:
    """Return the name of the model in the API, without any local path."""
    return inference_pipeline.model_info(ref)["name"]


def parse_aliases(given: Iterable[str]) -> tuple[str, ...]:
    """Return the operator's names for the model. Raises LabError."""
    for name in given:
        if not re.fullmatch(r"[\w.:@/+-]{1,100}", name, re.ASCII):
            raise LabError(
                f"--alias takes a model name of up to 100 letters, digits and . : @ / + - without spaces, got {name!r}"
            )
    return tuple(given)
