"""Engines that decode windows of log-mel frames to text.

    transformers   any torch device: CPU, CUDA, MPS, ZeroGPU
    ctranslate2    the same weights in int8 or half precision (export/): about four times as fast on a CPU
    onnx           the same weights as two graphs for ONNX Runtime, on a CPU: in int8 twice as fast again

All decode greedily by default, at the length of the given windows, and return a log-probability for each word.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np

from pipelines.infra import environment
from pipelines.infra.errors import LabError
from pipelines.speech.audio import Waveform
from pipelines.whisper import export, tokens
from pipelines.whisper.decoding import Hypothesis
from pipelines.whisper.decoding_options import MAX_NEW_TOKENS, DecodingOptions
from pipelines.whisper.engines.ctranslate2_engine import CTranslate2
from pipelines.whisper.engines.onnx_engine import Onnx
from pipelines.whisper.engines.transformers_engine import Transformers
from pipelines.whisper.engines.whisper_cpp_engine import WhisperCpp
from pipelines.whisper.export import onnx_graph
from pipelines.whisper.log_mel import LogMel
from pipelines.whisper.model import ModelRef

logger = logging.getLogger(__name__)

ENGINES = ("auto", "transformers", "ctranslate2", "onnx")
_MAX_ONNX_WEIGHTS_BYTES = 2_000_000_000
"""Exporting graphs needs several times the memory of the weights; CTranslate2 converts larger models with less."""


class Engine(Protocol):
    """A loaded model. Only one thread at a time may call it."""

    name: str
    """Engine, device and precision, such as `ctranslate2 cpu int8`."""
    n_mels: int
    can_align: bool
    """Whether the model names alignment heads, which `word_starts` needs."""

    def check(self, options: DecodingOptions) -> None:
        """Raise LabError for an option that the engine or the model lacks."""

    def log_mel(self, waveform: Waveform) -> LogMel:
        """Return the features of a window of at most 30 s (log_mel.extract, or equal within rounding)."""

    def decode(
        self, windows: np.ndarray, options: DecodingOptions | None = None, temperature: float = 0.0
    ) -> list[Hypothesis]:
        """Return the hypotheses, words included, of `windows` float32 [B, n_mels, T], T even and at most 3000.

        By default greedy and without timestamps. Raises LabError for an option that the engine or model lacks.
        """

    def detect_language(self, window: np.ndarray) -> str:
        """Return the code of the likeliest language of `window` float32 [n_mels, T].

        Raises LabError for an English-only model.
        """

    def word_starts(self, windows: np.ndarray, frames: Sequence[int], texts: Sequence[str]) -> list[list[float]]:
        """Return for each window the start of each word of its text, split at white space, in seconds from its start.

        `windows` float32 [B, n_mels, T], of which `frames` each are not padding; windows that `decode` was called with
        last are not encoded again (encoder_states.py). Uses the cross-attention of the alignment heads and dynamic time
        warping (word_timestamps.py). Empty for an empty text, and for one that the engine cannot align.
        """


@runtime_checkable
class AttentiveEngine(Engine, Protocol):
    """An engine that also returns the attention itself: transformers and ONNX Runtime."""

    def attention(self, window: np.ndarray, n_frames: int, text: str) -> np.ndarray:
        """Return the attention with which each token of `text`, and the end, is written.

        `window` float32 [n_mels, T], of which `n_frames` are not padding. The attention is float32 [alignment heads,
        tokens + 1, positions that are not padding]. Requires `can_align`.
        """


@dataclass(frozen=True)
class _Request:
    """What `open_engine` was called with."""

    ref: ModelRef
    options: DecodingOptions
    device: str
    compute_type: str
    threads: int

    @property
    def export_format(self) -> str:
        """The engine that reads `ref` if it is an export; otherwise empty."""
        return self.ref.facts["kind"] if export.is_export(self.ref) else ""


def open_engine(
    ref: ModelRef,
    language: str = "sv",
    engine: str = "auto",
    *,
    device: str = "",
    compute_type: str = "",
    threads: int = 0,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Engine:
    """Load a model in one of ENGINES.

    `auto` takes the fastest installed engine: on a CPU ONNX Runtime (if the processor has VNNI), CTranslate2 and
    transformers, in this order; elsewhere transformers; for an export (export/) the engine that reads it.
    `compute_type`: export.COMPUTE_TYPES for CTranslate2, int8 or float32 for ONNX Runtime; by default int8 on a CPU,
    float16 on a GPU. `threads`: of the CPU; 0 for all cores that this process may use. Raises LabError.
    """
    if engine not in ENGINES:
        raise LabError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    tokens.check_language(ref.folder, language)
    request = _Request(
        ref,
        DecodingOptions(language, timestamps=False, max_new_tokens=max_new_tokens),
        device,
        compute_type,
        threads,
    )
    export_format = request.export_format
    if export_format and engine not in ("auto", export_format):
        raise LabError(
            f"{ref.title} is an export for --engine {export_format}, got {engine}: name the model it was made of"
        )
    engine = export_format or engine
    if engine == "onnx" and device not in ("", "cpu"):
        raise LabError(f"the lab runs ONNX graphs on a CPU, not on {device}: take --engine transformers")
    request = replace(request, device="cpu" if engine == "onnx" else device or _detect_device(engine))
    return _open_fastest(request) if engine == "auto" else _OPEN[engine](request)


def _open_fastest(request: _Request) -> Engine:
    """Open the first engine that can load the model, in order of speed."""
    failed = None
    for engine in _faster_engines(request.ref, request.device, request.compute_type):
        try:
            return _OPEN[engine](request)
        except LabError as error:  # another engine may convert the model
            failed = error
            logger.info(f"{error}; trying the next engine")
    if failed and importlib.util.find_spec("torch") is None:
        raise failed
    if request.device == "cpu" and not failed:
        logger.info("decoding is several times as fast on this CPU after: pip install 'onnx>=1.16' 'onnxruntime>=1.20'")
    return _open_transformers(request)


def _open_transformers(request: _Request) -> Engine:
    if request.compute_type:
        raise LabError(
            f"compute type {request.compute_type} is for --engine ctranslate2; transformers decodes in float32"
        )
    return Transformers(request.ref, request.options, request.device, request.threads)


def _open_onnx(request: _Request) -> Engine:
    if request.compute_type not in ("", "int8", "float32"):
        raise LabError(
            f"ONNX Runtime computes in int8 or float32, got {request.compute_type}: take --engine ctranslate2"
        )
    form = "onnx" if request.compute_type == "float32" else "onnx-int8"
    folder = request.ref.folder if request.export_format else export.convert(request.ref, form)
    return Onnx(folder, request.options, request.threads)


def _open_ctranslate2(request: _Request) -> Engine:
    ref, device = request.ref, request.device
    if device not in ("cpu", "cuda"):
        raise LabError(f"CTranslate2 runs on cpu and cuda, not on {device}: take --engine transformers")
    if request.export_format:
        folder, compute_type = ref.folder, request.compute_type or "default"
    else:
        compute_type = request.compute_type or ("int8" if device == "cpu" else "float16")
        folder = export.export(ref, compute_type)
    return CTranslate2(folder, request.options, device, compute_type, request.threads)


def _open_whisper_cpp(request: _Request) -> Engine:
    return WhisperCpp(request.ref.folder, request.options, request.threads)


_OPEN = {
    "transformers": _open_transformers,
    "ctranslate2": _open_ctranslate2,
    "onnx": _open_onnx,
    "ggml": _open_whisper_cpp,
}


def _faster_engines(ref: ModelRef, device: str, compute_type: str) -> Iterator[str]:
    """Yield the installed engines that are faster than transformers on `device`, the fastest first."""
    if device != "cpu":
        return
    weights = ref.folder / "model.safetensors"
    is_large = weights.is_file() and weights.stat().st_size > _MAX_ONNX_WEIGHTS_BYTES
    onnx_is_faster = compute_type in ("", "int8") and not onnx_graph.needs_seven_bits()
    if onnx_is_faster and not is_large and export.installed("onnx-int8"):
        yield "onnx"
    if export.installed():
        yield "ctranslate2"


def _detect_device(engine: str) -> str:
    """Return cuda, mps or cpu. CTranslate2 can answer without importing torch."""
    if engine != "transformers" and sys.platform != "darwin" and export.installed():
        import ctranslate2

        return "cuda" if ctranslate2.get_cuda_device_count() else "cpu"
    return environment.detect().device
