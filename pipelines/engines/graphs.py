"""Decoding by ONNX Runtime: the two graphs of an export, on a CPU. No torch, no transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from pipelines import features
from pipelines.audio import Waveform
from pipelines.decoding import Heard
from pipelines.errors import missing_package
from pipelines.export.graph import DECODER, ENCODER
from pipelines.features import LogMel
from pipelines.labels import Spelling


class Onnx:
    """An exported folder (export/graph.py), loaded. It takes windows of any even length, as the tuned weights do."""

    def __init__(self, folder: Path, language: str, threads: int, max_new_tokens: int):
        from tokenizers import Tokenizer

        self.spelling = Spelling(Tokenizer.from_file(str(folder / "tokenizer.json")))
        self.prompt = self.spelling.prompt(language)
        self.encoder, self.decoder = (_session(folder / name, threads) for name in (ENCODER, DECODER))
        told = json.loads((folder / "generation_config.json").read_text("utf-8"))
        self.suppressed = told.get("suppress_tokens") or []
        self.suppressed_first = told.get("begin_suppress_tokens") or []
        self.max_new_tokens = max_new_tokens
        self.n_mels = self.encoder.get_inputs()[0].shape[1]
        self.name = "onnxruntime cpu float32"

    def log_mel(self, waveform: Waveform) -> LogMel:
        return features.extract_light(waveform, self.n_mels)

    def hear(self, windows: np.ndarray, temperature: float = 0.0, seed: int = 0) -> list[Heard]:
        draws, ids, logprobs = np.random.default_rng(seed), [], []
        step = self._steps(windows, self.prompt)
        ended, chosen = np.zeros(len(windows), dtype=bool), None
        for number in range(self.max_new_tokens):
            logits = step(chosen)
            logits[:, self.suppressed if number else [*self.suppressed, *self.suppressed_first]] = -np.inf
            noise = temperature * draws.gumbel(size=logits.shape) if temperature else 0.0
            chosen = (logits + noise).argmax(axis=-1)
            ids.append(np.where(ended, -1, chosen))
            logprobs.append(_log_softmax(logits)[np.arange(len(chosen)), chosen])
            ended |= chosen == self.spelling.end
            if ended.all():
                break
        return [self._heard(*told) for told in zip(np.stack(ids, axis=1), np.stack(logprobs, axis=1), strict=True)]

    def word_starts(self, window: np.ndarray, frames: int, text: str) -> list[float]:
        return []  # its graphs do not tell where they look

    def no_speech(self, windows: np.ndarray) -> list[float]:
        start, *_, no_timestamps = self.prompt
        told = _log_softmax(self._steps(windows, [start])(None))
        return np.exp(told[:, no_timestamps - 1]).tolist()  # <|nospeech|>: see decoding.no_speech

    def _steps(self, windows: np.ndarray, prompt: list[int]) -> Any:
        """A function from the last tokens int64 [B] (None: the prompt) to the logits float32 [B, vocabulary] of the
        next."""
        (cross,) = self.encoder.run(None, {"features": np.ascontiguousarray(windows, dtype=np.float32)})
        past = cross[:, :, :, :, :0]

        def step(chosen: np.ndarray | None) -> np.ndarray:
            nonlocal past
            tokens = np.array([prompt] * len(windows)) if chosen is None else chosen[:, None]
            told = {"tokens": tokens.astype(np.int64), "past": past, "cross": cross}
            logits, past = self.decoder.run(None, told)
            return logits

        return step

    def _heard(self, ids: np.ndarray, logprobs: np.ndarray) -> Heard:
        own = ids >= 0
        told, sure = ids[own].tolist(), logprobs[own].tolist()
        spoken = [token for token in told if token != self.spelling.end]
        words = self.spelling.words(spoken, sure[: len(spoken)])
        return Heard(self.spelling.text(spoken), sum(sure) / len(sure), len(sure), words)


def _session(path: Path, threads: int) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise missing_package("onnxruntime", "onnxruntime>=1.20", "decoding with ONNX Runtime") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # threads that wait for work leave the cores to others
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    most = logits.max(axis=-1, keepdims=True)
    return logits - most - np.log(np.exp(logits - most).sum(axis=-1, keepdims=True))
