"""What a transcript depends on besides the model and the audio, for every engine, command and server."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any

from pipelines.infra.errors import LabError
from pipelines.speech.repetition import MAX_COMPRESSION_RATIO

TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""The steps of OpenAI's decoder: each is tried if the attempt before it failed (`DecodingOptions.fallback_...`)."""
MAX_NEW_TOKENS = 224
"""Half of Whisper's text context of 448, as in openai/whisper, decoding.py (`sample_len`)."""
MAX_BEAMS = 32
TASKS = ("transcribe", "translate")


def parse_hotwords(text: str) -> tuple[str, ...]:
    """Return the words and phrases in a text, which are separated by commas or lines."""
    return tuple(filter(None, map(str.strip, re.split("[,\n]", text))))


@dataclass(frozen=True)
class DecodingOptions:
    """Options of one transcription. All engines read the same ones; one that lacks an option says so.

    Names and defaults are those of openai/whisper and faster-whisper, except where a docstring says otherwise.
    """

    language: str = "sv"
    """Code of one of Whisper's languages, such as `sv`."""
    task: str = "transcribe"
    """`transcribe`, or `translate` to English for multilingual models that were not fine-tuned."""
    timestamps: bool = True
    """Let the decoder write timestamps at the edges of sentences, by OpenAI's rules."""
    beam_size: int = 1
    """Hypotheses that are extended side by side at temperature 0; 1 decodes greedily."""
    patience: float = 1.0
    """Beam search ends after `beam_size` times this number of finished hypotheses (arXiv:2204.05424)."""
    length_penalty: float = 1.0
    """Finished hypotheses are ranked by log-probability over length to this power."""
    temperatures: tuple[float, ...] = TEMPERATURES
    """Tried in turn; the first is the usual one. Above 0 tokens are sampled."""
    max_compression_ratio: float = MAX_COMPRESSION_RATIO
    """The next temperature is tried if the text, compressed, is shorter by more than this factor."""
    min_logprob: float = -1.0
    """The next temperature is tried if the mean log-probability of the tokens is lower."""
    no_speech_threshold: float = 0.6
    """A window has no transcript if no speech is more probable and `min_logprob` is not reached."""
    prompt: str = ""
    """Text before the recording, for spelling and style: at most half of the decoder's positions, the end is kept."""
    hotwords: tuple[str, ...] = ()
    """Words and phrases whose tokens become more probable while they are being spelled."""
    suppress_tokens: tuple[int, ...] = ()
    """Token ids that are never written, besides those of the model's generation_config.json."""
    max_new_tokens: int = MAX_NEW_TOKENS
    """Longer texts of a window are cut. The end token and timestamps are counted, the prompt is not."""
    seed: int = 0
    """Starts the generator that samples tokens above temperature 0."""

    def __post_init__(self) -> None:
        for name, (kind, low, high, expected) in _RANGES.items():
            value = getattr(self, name)
            is_number = isinstance(value, kind) and not isinstance(value, bool)
            if not is_number or not math.isfinite(value) or not low <= value <= high:
                raise LabError(f"{name} must be {expected}, got {value!r}")
        if self.task not in TASKS:
            raise LabError(f"task must be one of {', '.join(TASKS)}, got {self.task!r}")
        if not all(type(token) is int and token >= 0 for token in self.suppress_tokens):
            raise LabError(f"suppress_tokens must be token ids from 0, got {self.suppress_tokens!r}")
        is_range = all(type(t) in (int, float) and 0 <= t <= 1 for t in self.temperatures)
        if not self.temperatures or not is_range:
            raise LabError(f"temperature must be one or more numbers from 0 to 1, got {self.temperatures!r}")
        for name, text in (("prompt", self.prompt), *(("hotwords", word) for word in self.hotwords)):
            try:
                text.encode()
            except UnicodeEncodeError:  # half of a pair of surrogates, which JSON can carry
                raise LabError(f"{name} must be text that UTF-8 can encode, got {text!r}") from None

    def changed(self, **values: Any) -> DecodingOptions:
        """Return the options with `values`; None keeps a value. Raises LabError for a value out of range."""
        return replace(self, **{name: value for name, value in values.items() if value is not None})


_REAL = (int, float)
_RANGES = {
    "beam_size": (int, 1, MAX_BEAMS, f"a whole number from 1 to {MAX_BEAMS}"),
    "patience": (_REAL, 0.1, 10, "a number from 0.1 to 10"),
    "length_penalty": (_REAL, -2, 4, "a number from -2 to 4"),
    "max_compression_ratio": (_REAL, 1, 100, "a number from 1 to 100"),
    "min_logprob": (_REAL, -100, 0, "a number from -100 to 0"),
    "no_speech_threshold": (_REAL, 0, 1, "a number from 0 to 1"),
    "max_new_tokens": (int, 1, 10_000, "a whole number of at least 1"),
    "seed": (int, 0, 2**32 - 1, "a whole number from 0 to 4294967295"),
}
"""Number type, range and description of each numeric option."""
