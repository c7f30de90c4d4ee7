"""Decode with ONNX Runtime on a CPU: the two graphs of an export (export/onnx_graph.py). Needs no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.infra import manifest
from pipelines.infra.errors import LabError, missing_package
from pipelines.infra.parallel import process_pool
from pipelines.speech.audio import Waveform
from pipelines.whisper import log_mel as features
from pipelines.whisper import model_files
from pipelines.whisper.decoding import Hypothesis, RowDecodingOptions, no_speech_token
from pipelines.whisper.engines import word_timestamps
from pipelines.whisper.export.onnx_graph import DECODER, ENCODER, needs_seven_bits, state_names
from pipelines.whisper.log_mel import LogMel
from pipelines.whisper.tokens import read_spelling

States = dict[str, np.ndarray]
"""Keys and values by their names in the graphs."""


class Onnx:
    """A loaded export. It takes windows of any even number of frames, as fine-tuned weights do."""

    def __init__(self, folder: Path, options: RowDecodingOptions, threads: int):

        self.options = options
        self.spelling = read_spelling(folder)
        self.prompt = self.spelling.prompt(options.language)
        self.encoder, self.decoder = (_session(folder / name, threads) for name in (ENCODER, DECODER))
        generation = manifest.read_json(folder / "generation_config.json") or {}
        self.suppressed = np.array(generation.get("suppress_tokens") or [], dtype=np.int64)
        self.suppressed_first = np.array(generation.get("begin_suppress_tokens") or [], dtype=np.int64)
        self.text_positions = model_files.text_positions(folder)
        self.n_mels = self.encoder.get_inputs()[0].shape[1]
        layers = len(self.encoder.get_outputs()) // 2
        self.cross_names, self.past_names = state_names(layers), state_names(layers, "past_")
        self.present_names = state_names(layers, "present_")
        self.can_align = any(output.name == "attention" for output in self.decoder.get_outputs())
        self.name = f"onnxruntime cpu {_precision(folder)}"
        self._last: tuple[np.ndarray, States] | None = None

    def log_mel(self, waveform: Waveform) -> LogMel:
        return features.extract_light(waveform, self.n_mels)

    def decode(self, windows: np.ndarray, temperature: float = 0.0, seed: int = 0) -> list[Hypothesis]:
        rng = np.random.default_rng(seed)
        ids: list[list[int]] = [[] for _ in windows]
        logprobs: list[list[float]] = [[] for _ in windows]
        state, tokens = DecoderState(self, windows, self.prompt), None
        no_speech = self._no_speech(state.cross)
        rows = np.arange(len(windows))  # the window of each row of the batch; -1 once its text has ended
        for step in range(min(self.options.max_new_tokens, self.text_positions - len(self.prompt))):
            logits = state.step(tokens)
            logits[:, self.suppressed] = -np.inf
            if step == 0:
                logits[:, self.suppressed_first] = -np.inf
            scores = logits + temperature * rng.gumbel(size=logits.shape) if temperature else logits
            tokens = scores.argmax(axis=-1)
            for row, token, logprob in zip(rows.tolist(), tokens.tolist(), _logprobs(logits, tokens).tolist()):
                if row >= 0:
                    ids[row].append(token)
                    logprobs[row].append(logprob)
            rows[tokens == self.spelling.end] = -1
            running = rows >= 0
            if not running.any():
                break
            if 2 * running.sum() <= len(rows):  # stop computing rows whose text has ended
                state.select(running)
                tokens, rows = tokens[running], rows[running]
        return [self._hypothesis(*row) for row in zip(ids, logprobs, no_speech, strict=True)]

    def word_starts(self, window: np.ndarray, frames: int, text: str) -> list[float]:
        ids, firsts = self.spelling.ids(text)
        if not ids or not self.can_align or len(self.prompt) + len(ids) > self.text_positions:
            return []
        cross = self.encode(window[np.newaxis])
        inputs = {"tokens": np.array([[*self.prompt, *ids]]), **self.empty_past(1, cross), **cross}
        (cross_attention,) = self.decoder.run(["attention"], inputs)
        return word_timestamps.word_starts(cross_attention[:, 0], len(self.prompt), frames, firsts)

    def encode(self, windows: np.ndarray) -> States:
        """Return the cross-attention keys and values of `windows` float [B, n_mels, T].

        Those of a single window are cached: decode, at several temperatures, and word_starts are called with the same
        window one after another.
        """
        if self._last and np.array_equal(self._last[0], windows):
            return self._last[1]
        self._last = None  # free it before the next states are allocated
        states = self.encoder.run(None, {"features": np.ascontiguousarray(windows, dtype=np.float32)})
        cross = dict(zip(self.cross_names, states, strict=True))
        self._last = (windows.copy(), cross) if len(windows) == 1 else None
        return cross

    def empty_past(self, batch: int, cross: States) -> States:
        """Return keys and values of no tokens."""
        _, heads, width, _ = cross["key_0"].shape
        shapes = {"key": (batch, heads, width, 0), "value": (batch, heads, 0, width)}
        return {name: np.zeros(shapes[name.split("_")[1]], dtype=np.float32) for name in self.past_names}

    def _no_speech(self, cross: States) -> list[float]:
        """Return the probabilities of no speech of encoded windows (decoding.no_speech_probabilities)."""
        batch = len(cross["key_0"])
        start = np.full((batch, 1), self.prompt[0], dtype=np.int64)
        (logits,) = self.decoder.run(["logits"], {"tokens": start, **self.empty_past(batch, cross), **cross})
        return np.exp(_logprobs(logits, np.full(batch, no_speech_token(self.prompt)))).tolist()

    def _hypothesis(self, ids: list[int], logprobs: list[float], no_speech: float) -> Hypothesis:
        text_ids = [token for token in ids if token != self.spelling.end]
        words = self.spelling.words(text_ids, logprobs[: len(text_ids)])
        mean = sum(logprobs) / len(logprobs)
        return Hypothesis(self.spelling.text(text_ids), mean, len(logprobs), words, no_speech)


class DecoderState:
    """The decoder's keys and values for a batch of texts that grow by one token at a time."""

    def __init__(self, engine: Onnx, windows: np.ndarray, prompt: list[int]):
        self.engine, self.prompt = engine, prompt
        self.cross = engine.encode(windows)
        self.past = engine.empty_past(len(windows), self.cross)

    def step(self, tokens: np.ndarray | None) -> np.ndarray:
        """Append `tokens` int64 [B], or the prompt if None, and return the next logits float32 [B, vocabulary]."""
        batch = len(self.cross["key_0"])
        new = np.array([self.prompt] * batch) if tokens is None else tokens[:, None]
        inputs = {"tokens": new.astype(np.int64), **self.past, **self.cross}
        logits, *present = self.engine.decoder.run(["logits", *self.engine.present_names], inputs)
        self.past = dict(zip(self.engine.past_names, present, strict=True))
        return logits

    def select(self, rows: np.ndarray) -> None:
        """Continue with the texts marked in `rows`, bool [B]."""
        self.cross = {name: state[rows] for name, state in self.cross.items()}
        self.past = {name: state[rows] for name, state in self.past.items()}


def _precision(folder: Path) -> str:
    """Return float32 or int8. Raises LabError for eight-bit weights on a processor that needs seven bits."""
    path = folder / "manifest.json"
    bits = json.loads(path.read_text("utf-8")).get("made_of", {}).get("bits") if path.is_file() else None
    if bits == 8 and needs_seven_bits():
        raise LabError(
            f"{folder} holds weights for processors with VNNI, which this one lacks: make the export on this machine"
        )
    return "int8" if bits else "float32"


def _session(path: Path, threads: int) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise missing_package("onnxruntime", "onnxruntime>=1.20", "decoding with ONNX Runtime") from None
    options = onnxruntime.SessionOptions()
    # always a number: by default ONNX Runtime counts cores that this process may not use and pins its threads to them
    options.intra_op_num_threads = threads or process_pool.cores()
    options.log_severity_level = 3
    # waiting threads leave the cores to others
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _logprobs(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Return the log-probabilities float32 [B] of `tokens` int64 [B] under `logits` float32 [B, vocabulary]."""
    largest = logits.max(axis=-1)
    log_sum = np.log(np.exp(logits - largest[:, None]).sum(axis=-1))
    return logits[np.arange(len(tokens)), tokens] - largest - log_sum
