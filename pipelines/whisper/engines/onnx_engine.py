"""Decoding by ONNX Runtime: the two graphs of an export, on a CPU. No torch, no transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.infra.errors import LabError, missing_package
from pipelines.infra.parallel import process_pool
from pipelines.speech.audio import Waveform
from pipelines.whisper import log_mel as features
from pipelines.whisper.decoding import Hypothesis
from pipelines.whisper.engines import word_timestamps
from pipelines.whisper.export.onnx_graph import DECODER, ENCODER, state_names, wants_seven_bits
from pipelines.whisper.log_mel import LogMel
from pipelines.whisper.tokens import Spelling

States = dict[str, np.ndarray]
"""Keys and values by their names in the graphs (export/graph.py)."""


class Onnx:
    """An exported folder (export/graph.py), loaded. It takes windows of any even length, as the tuned weights do."""

    def __init__(self, folder: Path, language: str, threads: int, max_new_tokens: int):
        from tokenizers import Tokenizer

        self.spelling = Spelling(Tokenizer.from_file(str(folder / "tokenizer.json")))
        self.prompt = self.spelling.prompt(language)
        self.encoder, self.decoder = (_session(folder / name, threads) for name in (ENCODER, DECODER))
        told = json.loads((folder / "generation_config.json").read_text("utf-8"))
        self.suppressed = np.array(told.get("suppress_tokens") or [], dtype=np.int64)
        self.suppressed_first = np.array(told.get("begin_suppress_tokens") or [], dtype=np.int64)
        self.max_new_tokens = max_new_tokens
        self.n_mels = self.encoder.get_inputs()[0].shape[1]
        layers = len(self.encoder.get_outputs()) // 2
        self.heard_names, self.past_names = state_names(layers), state_names(layers, "past_")
        self.present_names = state_names(layers, "present_")
        self.can_align = any(output.name == "attention" for output in self.decoder.get_outputs())
        self.name = f"onnxruntime cpu {_precision(folder)}"
        self.last: tuple[np.ndarray, States] | None = None

    def log_mel(self, waveform: Waveform) -> LogMel:
        return features.extract_light(waveform, self.n_mels)

    def decode(self, windows: np.ndarray, temperature: float = 0.0, seed: int = 0) -> list[Hypothesis]:
        draws = np.random.default_rng(seed)
        ids: list[list[int]] = [[] for _ in windows]
        sure: list[list[float]] = [[] for _ in windows]
        writing = _Writing(self, windows, self.prompt)
        live, chosen = np.arange(len(windows)), None
        for number in range(self.max_new_tokens):
            logits = writing.step(chosen)
            logits[:, self.suppressed] = -np.inf
            if not number:
                logits[:, self.suppressed_first] = -np.inf
            drawn = logits + temperature * draws.gumbel(size=logits.shape) if temperature else logits
            chosen = drawn.argmax(axis=-1)
            for row, token, logprob in zip(live.tolist(), chosen.tolist(), _logprobs(logits, chosen).tolist()):
                if row >= 0:
                    ids[row].append(token)
                    sure[row].append(logprob)
            live[chosen == self.spelling.end] = -1
            if (live < 0).all():
                break
            if 2 * (live >= 0).sum() <= len(live):  # the rows that are done are decoded no further
                writing.keep(live >= 0)
                chosen, live = chosen[live >= 0], live[live >= 0]
        return [self._hypothesis(*told) for told in zip(ids, sure, strict=True)]

    def word_starts(self, window: np.ndarray, frames: int, text: str) -> list[float]:
        """By the heads of the decoder that follow the sound, and dynamic time warping: as OpenAI times words."""
        ids, firsts = self.spelling.ids(text)
        if not ids or not self.can_align:
            return []
        heard = self._encoded(window[np.newaxis])
        told = {"tokens": np.array([[*self.prompt, *ids]]), **self._unwritten(1, heard), **heard}
        (cross_attention,) = self.decoder.run(["attention"], told)
        # a token's row is the attention that predicts the next token: the last of the prompt predicts the text's first
        positions = word_timestamps.first_positions(cross_attention[:, 0, len(self.prompt) - 1 :, : -(-frames // 2)])
        return [positions[n] * word_timestamps.POSITION_S for n in firsts]

    def no_speech(self, windows: np.ndarray) -> list[float]:
        start, *_, no_timestamps = self.prompt
        logits = _Writing(self, windows, [start]).step(None)
        token = np.full(len(windows), no_timestamps - 1)  # <|nospeech|>: see decoding.no_speech
        return np.exp(_logprobs(logits, token)).tolist()

    def _encoded(self, windows: np.ndarray) -> States:
        """Keys and values over the recordings.

        Those of a window by itself are kept until the next one: whether it is silent, a warmer try, and when its words
        begin are asked of the same window.
        """
        if self.last and np.array_equal(self.last[0], windows):
            return self.last[1]
        self.last = None  # two windows of 30 s need not lie in memory at once
        told = self.encoder.run(None, {"features": np.ascontiguousarray(windows, dtype=np.float32)})
        heard = dict(zip(self.heard_names, told, strict=True))
        self.last = (windows.copy(), heard) if len(windows) == 1 else None
        return heard

    def _unwritten(self, batch: int, heard: States) -> States:
        """Keys and values over a text of no tokens yet."""
        _, heads, width, _ = heard["key_0"].shape
        none = {"key": (batch, heads, width, 0), "value": (batch, heads, 0, width)}
        return {name: np.zeros(none[name.split("_")[1]], dtype=np.float32) for name in self.past_names}

    def _hypothesis(self, ids: list[int], sure: list[float]) -> Hypothesis:
        spoken = [token for token in ids if token != self.spelling.end]
        words = self.spelling.words(spoken, sure[: len(spoken)])
        return Hypothesis(self.spelling.text(spoken), sum(sure) / len(sure), len(sure), words)


class _Writing:
    """Texts that grow by a token at a time: what the decoder knows of each."""

    def __init__(self, engine: Onnx, windows: np.ndarray, prompt: list[int]):
        self.engine, self.prompt = engine, prompt
        self.heard = engine._encoded(windows)
        self.past = engine._unwritten(len(windows), self.heard)

    def step(self, chosen: np.ndarray | None) -> np.ndarray:
        """The logits float32 [B, vocabulary] after the last tokens int64 [B]; None: after the prompt."""
        batch = len(self.heard["key_0"])
        tokens = np.array([self.prompt] * batch) if chosen is None else chosen[:, None]
        told = {"tokens": tokens.astype(np.int64), **self.past, **self.heard}
        logits, *present = self.engine.decoder.run(["logits", *self.engine.present_names], told)
        self.past = dict(zip(self.engine.past_names, present, strict=True))
        return logits

    def keep(self, rows: np.ndarray) -> None:
        """Go on with those of the texts that `rows`, bool [B], names."""
        self.heard = {name: state[rows] for name, state in self.heard.items()}
        self.past = {name: state[rows] for name, state in self.past.items()}


def _precision(folder: Path) -> str:
    """float32 or int8. LabError for weights in eight bits on a processor that would add them wrongly."""
    told = folder / "manifest.json"
    made_of = json.loads(told.read_text("utf-8")).get("made_of", {}) if told.is_file() else {}
    if made_of.get("bits") == 8 and wants_seven_bits():
        raise LabError(
            f"{folder} holds weights for processors with VNNI, which this one lacks: make the export on this machine"
        )
    return "int8" if made_of.get("bits") else "float32"


def _session(path: Path, threads: int) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise missing_package("onnxruntime", "onnxruntime>=1.20", "decoding with ONNX Runtime") from None
    options = onnxruntime.SessionOptions()
    # a number in any case: left to itself ONNX Runtime counts cores that are not ours, and pins its threads to them
    options.intra_op_num_threads = threads or process_pool.cores()
    options.log_severity_level = 3
    # threads that wait for work leave the cores to others
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _logprobs(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The log-probabilities float32 [B] of one token each by logits float32 [B, vocabulary]."""
    most = logits.max(axis=-1)
    return logits[np.arange(len(tokens)), tokens] - most - np.log(np.exp(logits - most[:, None]).sum(axis=-1))
