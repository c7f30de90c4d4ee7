"""Decode ggml files with whisper.cpp, through its Python binding, to compare an export with its model.

The program pads every window to 30 s, as it does for its users. It gets the model's own log-mel features, so that the
features of a cache can be scored. It searches greedily, without timestamps and without falling back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipelines.infra.errors import LabError, missing_package
from pipelines.infra.parallel import process_pool
from pipelines.speech.audio import Waveform
from pipelines.whisper import log_mel as features
from pipelines.whisper.decoding import Hypothesis
from pipelines.whisper.decoding_options import DecodingOptions
from pipelines.whisper.export import ggml
from pipelines.whisper.log_mel import FULL_FRAMES, LogMel

_GREEDY = 0
"""WHISPER_SAMPLING_GREEDY in whisper.h."""
_MS_PER_FRAME = 10
_NEVER = 1.0
"""A probability of no speech that is not exceeded: no text is dropped."""


class WhisperCpp:
    """A loaded ggml file."""

    can_align = False

    def __init__(self, folder: Path, options: DecodingOptions, threads: int):
        try:
            import _pywhispercpp
            from pywhispercpp.model import Model
        except ImportError:
            raise missing_package("pywhispercpp", "pywhispercpp>=1.5", "scoring ggml files") from None
        self.options, self.binding = options, _pywhispercpp
        self.model = Model(
            str(folder / ggml.FILE_NAME), params_sampling_strategy=_GREEDY, redirect_whispercpp_logs_to=None
        )
        self.n_mels = self.binding.whisper_model_n_mels(self.model._ctx)
        self.name = f"whisper.cpp cpu {ggml.precision_of(folder / ggml.FILE_NAME)}"
        self.settings = {
            "language": options.language,
            "n_threads": threads or process_pool.cores(),
            "no_timestamps": True,
            "single_segment": True,
            "suppress_nst": True,  # as the generation settings of OpenAI's models do
            "temperature_inc": 0.0,
            "no_speech_thold": _NEVER,
            "print_progress": False,
        }

    def check(self, options: DecodingOptions) -> None:
        plain = DecodingOptions(options.language, timestamps=False, max_new_tokens=options.max_new_tokens)
        if options != plain:
            raise LabError(
                "the lab scores ggml files, greedily and without timestamps, and does not transcribe with them: use "
                "whisper.cpp, or name the model that the file was made of"
            )

    def log_mel(self, waveform: Waveform) -> LogMel:
        return features.extract_light(waveform, self.n_mels)

    def decode(
        self, windows: np.ndarray, options: DecodingOptions | None = None, temperature: float = 0.0
    ) -> list[Hypothesis]:
        options = options or self.options
        self.check(options)
        return [self._decode(window, options) for window in windows]

    def detect_language(self, window: np.ndarray) -> str:
        raise LabError("the lab does not detect languages with ggml files: name the language")

    def word_starts(self, windows: np.ndarray, frames: Sequence[int], texts: Sequence[str]) -> list[list[float]]:
        return [[] for _ in texts]

    def _decode(self, window: np.ndarray, options: DecodingOptions) -> Hypothesis:
        full = np.full((len(window), FULL_FRAMES), features.pad_value(window), dtype=np.float32)
        full[:, : window.shape[-1]] = window
        context, settings = self.model._ctx, self.model._params
        changing = {"max_tokens": options.max_new_tokens, "duration_ms": window.shape[-1] * _MS_PER_FRAME}
        for name, value in (self.settings | {"language": options.language} | changing).items():
            setattr(settings, name, value)
        binding = self.binding
        binding.whisper_set_mel(context, full, FULL_FRAMES, len(window))
        if binding.whisper_full(context, settings, np.zeros(0, dtype=np.float32), 0):  # no samples: the features count
            raise LabError("whisper.cpp could not decode a window: run this again with more memory")
        segments = range(binding.whisper_full_n_segments(context))
        text = b"".join(_bytes(binding.whisper_full_get_segment_text(context, one)) for one in segments)
        logprobs = [
            math.log(max(binding.whisper_full_get_token_p(context, segment, token), 1e-9))
            for segment in segments
            for token in range(binding.whisper_full_n_tokens(context, segment))
        ]
        mean = sum(logprobs) / max(len(logprobs), 1)
        return Hypothesis(text.decode("utf-8", "replace").strip(), mean, len(logprobs))


def _bytes(text: bytes | str) -> bytes:
    return text if isinstance(text, bytes) else text.encode()
