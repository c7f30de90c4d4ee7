"""The transcribers that benchmarks/inference.py compares: ours and those of other projects, each as its users run it.

Every side has the language, the same weights and the same number of threads. Everything else is the default of its
project, except for what SIDES names. Which arguments a side gets is part of the benchmark's output (`arguments`).
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from pipelines.speech.audio import SAMPLE_RATE_HZ, Waveform
from pipelines.whisper import export
from pipelines.whisper.export import ggml
from pipelines.whisper.model import ModelRef

LANGUAGE = "sv"
Transcribe = Callable[[np.ndarray, dict[str, Any]], str]
"""A loaded model: 16 kHz samples and the arguments of a call to the text."""


@dataclass(frozen=True)
class Request:
    """What all sides are given."""

    ref: ModelRef
    threads: int
    tokens: int = 0
    """Limit of tokens for a window; 0: each side's own."""
    as_tuned: bool = False
    """Decode at clip length on our side, and without fallback on every side, also for a model that was not tuned so."""


class Tool(NamedTuple):
    """A project: how its model is loaded, and the arguments that every side of it gets."""

    package: str
    """What `import` needs; empty if it is always there."""
    requirement: str
    load: Callable[[Request, dict[str, Any]], Transcribe]
    model_arguments: Callable[[Request], dict[str, Any]]
    call_arguments: Callable[[Request], dict[str, Any]]
    form: str = ""
    """The export of the weights that it reads, one of export.FORMS; empty: the model's folder."""


@dataclass(frozen=True)
class Side:
    """A project with the arguments of one way to use it."""

    tool: Tool
    clips: dict[str, Any] | None = field(default_factory=dict)
    """Arguments of a call for a clip; None: the side has no part in clips."""
    recordings: dict[str, Any] = field(default_factory=dict)
    """Arguments of a call for a long recording."""
    model: dict[str, Any] = field(default_factory=dict)
    """Arguments with which the model is loaded."""

    def arguments(self, request: Request) -> dict[str, Any]:
        """Return all arguments: of the `model`, and of a call for `clips` and for `recordings`."""
        common = self.tool.call_arguments(request)
        return {
            "model": {**self.tool.model_arguments(request), **self.model},
            "clips": None if self.clips is None else {**common, **self.clips},
            "recordings": {**common, **self.recordings},
        }

    def load(self, request: Request) -> Transcribe:
        return self.tool.load(request, self.arguments(request)["model"])

    def prepare(self, request: Request) -> None:
        """Convert the weights, so that no conversion is part of what is measured."""
        if self.tool.form:
            export.convert(request.ref, self.tool.form)
        elif self.tool is OURS:
            self.load(request)

    @property
    def missing(self) -> str:
        """The requirement to install before this side can run; empty if it can."""
        is_there = not self.tool.package or importlib.util.find_spec(self.tool.package)
        return "" if is_there else self.tool.requirement


# ---- ours


def _load_ours(request: Request, arguments: dict[str, Any]) -> Transcribe:
    from pipelines.inference.transcriber import Transcriber

    ref = replace(request.ref, context="clip") if request.as_tuned else request.ref
    transcriber = Transcriber(ref, **arguments)
    print(f"{transcriber.loaded.name}, {transcriber.options}", file=sys.stderr)
    return lambda samples, call: transcriber.with_options(**call).transcribe(Waveform(samples)).text


OURS = Tool(
    "",
    "",
    _load_ours,
    lambda request: {
        "language": LANGUAGE,
        "threads": request.threads,
        **({"max_new_tokens": request.tokens} if request.tokens else {}),
    },
    lambda request: {"temperatures": (0.0,)} if request.as_tuned else {},
)


# ---- faster-whisper


def _load_faster_whisper(request: Request, arguments: dict[str, Any]) -> Transcribe:
    from faster_whisper import WhisperModel

    model = WhisperModel(str(export.export(request.ref, "int8")), **arguments)
    return lambda samples, call: _joined(model.transcribe(samples, **call)[0])


def _load_batched(request: Request, arguments: dict[str, Any]) -> Transcribe:
    from faster_whisper import BatchedInferencePipeline, WhisperModel

    pipeline = BatchedInferencePipeline(WhisperModel(str(export.export(request.ref, "int8")), **arguments))
    return lambda samples, call: _joined(pipeline.transcribe(samples, **call)[0])


def _joined(segments: Any) -> str:
    return " ".join(segment.text.strip() for segment in segments)


FASTER_WHISPER = Tool(
    "faster_whisper",
    "faster-whisper>=1.2",
    _load_faster_whisper,
    lambda request: {"device": "cpu", "compute_type": "int8", "cpu_threads": request.threads},
    lambda request: {
        "language": LANGUAGE,
        **({"max_new_tokens": request.tokens} if request.tokens else {}),
        **({"temperature": 0.0} if request.as_tuned else {}),
    },
    "ctranslate2-int8",
)


# ---- transformers


def _load_pipeline(request: Request, arguments: dict[str, Any]) -> Transcribe:
    import torch
    from transformers import pipeline

    torch.set_num_threads(request.threads)
    recognizer = pipeline(model=str(request.ref.folder), **arguments)

    def transcribe(samples: np.ndarray, call: dict[str, Any]) -> str:
        return recognizer({"raw": samples, "sampling_rate": SAMPLE_RATE_HZ}, **call)["text"]

    return transcribe


TRANSFORMERS = Tool(
    "transformers",
    "transformers",
    _load_pipeline,
    lambda request: {"task": "automatic-speech-recognition"},
    lambda request: {
        "generate_kwargs": {
            "language": LANGUAGE,
            "task": "transcribe",
            **({"max_new_tokens": request.tokens} if request.tokens else {}),
        }
    },
)


# ---- whisper.cpp


def _load_whisper_cpp(request: Request, arguments: dict[str, Any]) -> Transcribe:
    from pywhispercpp.model import Model

    path = export.convert(request.ref, "ggml-f16") / ggml.FILE_NAME
    model = Model(str(path), redirect_whispercpp_logs_to=None, print_progress=False, **arguments)
    return lambda samples, call: _joined(model.transcribe(samples, **call))


WHISPER_CPP = Tool(
    "pywhispercpp",
    "pywhispercpp>=1.5",
    _load_whisper_cpp,
    lambda request: {"n_threads": request.threads},
    lambda request: {
        "language": LANGUAGE,
        **({"max_tokens": request.tokens} if request.tokens else {}),
        **({"temperature_inc": 0.0} if request.as_tuned else {}),
    },
    "ggml-f16",
)


SIDES = {
    "ours": Side(OURS),
    **{f"ours-beam{size}": Side(OURS, {"beam_size": size}, {"beam_size": size}) for size in (1, 5)},
    "faster-whisper": Side(FASTER_WHISPER),
    "faster-whisper-greedy": Side(FASTER_WHISPER, {"beam_size": 1}, {"beam_size": 1}),
    "faster-whisper-batched": Side(FASTER_WHISPER._replace(load=_load_batched), None),
    # its defaults do not accept more than 30 s
    "transformers": Side(TRANSFORMERS, {}, {"chunk_length_s": 30}),
    "transformers-timestamps": Side(TRANSFORMERS, {"return_timestamps": True}, {"return_timestamps": True}),
    "whisper.cpp": Side(WHISPER_CPP),
    **{f"ours-{name}": Side(OURS, model={"engine": name}) for name in ("onnx", "ctranslate2", "transformers")},
}
DEFAULT = [name for name in SIDES if not name.startswith("ours-")]
