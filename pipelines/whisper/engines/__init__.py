"""What turns windows of log-mel frames into text, on what this machine has.

    transformers   any device that torch knows: CPU, CUDA, MPS, ZeroGPU
    ctranslate2    the same weights in eight bits or half precision (export/): some four times as fast on a CPU
    onnx           the same weights as two graphs for ONNX Runtime, on a CPU: in eight bits twice as fast again

All decode greedily, at the length of the windows that they are given, and tell how sure they are of each word.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from pipelines.infra import environment
from pipelines.infra.errors import LabError
from pipelines.speech.audio import Waveform
from pipelines.whisper import export
from pipelines.whisper.decoding import Hypothesis
from pipelines.whisper.engines.ctranslate2_engine import CTranslate2
from pipelines.whisper.engines.onnx_engine import Onnx
from pipelines.whisper.engines.transformers_engine import Transformers
from pipelines.whisper.export import onnx_graph
from pipelines.whisper.log_mel import LogMel
from pipelines.whisper.model import ModelRef

logger = logging.getLogger(__name__)

ENGINES = ("auto", "transformers", "ctranslate2", "onnx")
MAX_NEW_TOKENS = 224
"""Half of Whisper's context, as OpenAI's decoder has it."""
_LARGEST_GRAPHS_BYTES = 2_000_000_000
"""Making graphs takes several times the memory of the weights; CTranslate2 converts larger models with less."""


class Engine(Protocol):
    """A loaded model. Safe to call from one thread at a time."""

    name: str
    """Engine, device and precision, as tables tell it: `ctranslate2 cpu int8`."""
    n_mels: int

    def log_mel(self, waveform: Waveform) -> LogMel:
        """The frames of a window of at most 30 s (features.extract, or as good as that)."""

    def decode(self, windows: np.ndarray, temperature: float = 0.0, seed: int = 0) -> list[Hypothesis]:
        """Return the hypotheses, words included, of `windows` float32 [B, n_mels, T], T even and at most 3000."""

    def word_starts(self, window: np.ndarray, frames: int, text: str) -> list[float]:
        """When each word of `text`, as it is split at blanks, begins in `window` [n_mels, T], in seconds.

        `frames` of it are not padding. Empty where the engine cannot tell.
        """

    def no_speech(self, windows: np.ndarray) -> list[float]:
        """The probability that each of `windows` holds no speech (decoding.no_speech)."""


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
    """The model, loaded. `auto` is the fastest that is installed: on a CPU ONNX Runtime (where the processor has VNNI),
    CTranslate2 and transformers, in this order; transformers elsewhere; of an export (export/) what reads it.

    `compute_type`: export.COMPUTE_TYPES for CTranslate2, int8 or float32 for ONNX Runtime; by default int8 on a CPU,
    float16 on a GPU.
    `threads`: of the CPU; 0 for all cores that this process may use. Raises LabError.
    """
    if engine not in ENGINES:
        raise LabError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    own = ref.facts["kind"] if export.is_export(ref) else ""
    if own and engine not in ("auto", own):
        raise LabError(f"{ref.title} is an export for --engine {own}, got {engine}: name the model it was made of")
    engine = own or engine
    if engine == "onnx" and device not in ("", "cpu"):
        raise LabError(f"the lab runs ONNX graphs on a CPU, not on {device}: take --engine transformers")
    device = "cpu" if engine == "onnx" else device or _device(engine)
    if engine == "auto":
        failed = None
        for engine in _fastest(ref, device, compute_type):
            try:
                return open_engine(
                    ref,
                    language,
                    engine,
                    device=device,
                    compute_type=compute_type,
                    threads=threads,
                    max_new_tokens=max_new_tokens,
                )
            except LabError as error:  # what one engine cannot convert, another may
                failed = error
                logger.info(f"{error}; trying the next engine")
        if failed and importlib.util.find_spec("torch") is None:
            raise failed
        engine = "transformers"
        if device == "cpu" and not failed:
            logger.info("on this CPU some ten times as fast after: pip install 'onnx>=1.16' 'onnxruntime>=1.20'")
    if engine == "transformers":
        if compute_type:
            raise LabError(f"compute type {compute_type} is for --engine ctranslate2; transformers decodes in float32")
        return Transformers(ref, language, device, threads, max_new_tokens)
    if engine == "onnx":
        if compute_type not in ("", "int8", "float32"):
            raise LabError(f"ONNX Runtime computes in int8 or float32, got {compute_type}: take --engine ctranslate2")
        form = "onnx" if compute_type == "float32" else "onnx-int8"
        return Onnx(ref.folder if own else export.convert(ref, form), language, threads, max_new_tokens)
    if device not in ("cpu", "cuda"):
        raise LabError(f"CTranslate2 runs on cpu and cuda, not on {device}: take --engine transformers")
    if own:
        return CTranslate2(ref.folder, language, device, compute_type or "default", threads, max_new_tokens)
    compute_type = compute_type or ("int8" if device == "cpu" else "float16")
    folder = export.export(ref, compute_type)
    return CTranslate2(folder, language, device, compute_type, threads, max_new_tokens)


def _fastest(ref: ModelRef, device: str, compute_type: str) -> Iterator[str]:
    """The engines faster than transformers that are installed for `device`, the fastest first."""
    if device != "cpu":
        return
    weights = ref.folder / "model.safetensors"
    large = weights.is_file() and weights.stat().st_size > _LARGEST_GRAPHS_BYTES
    told = compute_type in ("", "int8") and not large and not onnx_graph.wants_seven_bits()
    if told and export.installed("onnx-int8"):
        yield "onnx"
    if export.installed():
        yield "ctranslate2"


def _device(engine: str) -> str:
    """cuda, mps or cpu. Where CTranslate2 can tell, torch is not imported for it."""
    if engine != "transformers" and sys.platform != "darwin" and export.installed():
        import ctranslate2

        return "cuda" if ctranslate2.get_cuda_device_count() else "cpu"
    return environment.detect().device
