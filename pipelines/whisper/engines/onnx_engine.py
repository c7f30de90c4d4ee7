"""Decode with ONNX Runtime on a CPU: the two graphs of an export (export/onnx_graph.py). Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.infra import manifest
from pipelines.infra.errors import LabError, missing_package
from pipelines.infra.parallel import process_pool
from pipelines.speech.audio import Waveform
from pipelines.whisper import log_mel as features
from pipelines.whisper import model_files
from pipelines.whisper.decoding import Hypothesis
from pipelines.whisper.decoding_options import DecodingOptions
from pipelines.whisper.engines import search, word_timestamps
from pipelines.whisper.engines.encoder_states import EncoderStates
from pipelines.whisper.engines.search import Prompt
from pipelines.whisper.engines.token_rules import TokenRules
from pipelines.whisper.export.onnx_graph import DECODER, ENCODER, needs_seven_bits, state_names
from pipelines.whisper.log_mel import LogMel
from pipelines.whisper.tokens import read_spelling

States = dict[str, np.ndarray]
"""Keys and values by their names in the graphs."""
_MAX_COPIED_SHARE = 3 / 4
"""Keys and values of finished windows are dropped when at most this share of the windows still has texts."""


class Onnx:
    """A loaded export. It takes windows of any even number of frames, as fine-tuned weights do."""

    def __init__(self, folder: Path, options: DecodingOptions, threads: int):
        self.options = options
        self.spelling = read_spelling(folder)
        self.prompt = self.spelling.prompt(options.language)
        self.encoder, self.decoder = (_session(folder / name, threads) for name in (ENCODER, DECODER))
        generation = manifest.read_json(folder / "generation_config.json") or {}
        self.suppressed = generation.get("suppress_tokens") or []
        self.suppressed_first = generation.get("begin_suppress_tokens") or []
        self.text_positions = model_files.text_positions(folder)
        self.n_mels = self.encoder.get_inputs()[0].shape[1]
        layers = len(self.encoder.get_outputs()) // 2
        self.cross_names, self.past_names = state_names(layers), state_names(layers, "past_")
        self.present_names = state_names(layers, "present_")
        # else, in graphs of earlier versions, each text has its own copy of its window's keys and values
        self.texts_share_windows = any(one.name == "window_rows" for one in self.decoder.get_inputs())
        self.can_align = any(output.name == "attention" for output in self.decoder.get_outputs())
        self.name = f"onnxruntime cpu {_precision(folder)}"
        self.states = EncoderStates(self.encode)

    def check(self, options: DecodingOptions) -> None:
        self.spelling.search_prompt(options, self.text_positions)

    def log_mel(self, waveform: Waveform) -> LogMel:
        return features.extract_light(waveform, self.n_mels)

    def decode(
        self, windows: np.ndarray, options: DecodingOptions | None = None, temperature: float = 0.0
    ) -> list[Hypothesis]:
        options = options or self.options
        prompt = Prompt(*self.spelling.search_prompt(options, self.text_positions))
        rules = TokenRules.of(self.spelling, options, self.suppressed, self.suppressed_first)
        max_tokens = min(options.max_new_tokens, self.text_positions - len(prompt))
        decoder = OnnxDecoder(self, windows)
        texts = search.search(decoder, prompt, len(windows), rules, options, temperature, max_tokens)
        return [search.hypothesis(text, self.spelling, options) for text in texts]

    def detect_language(self, window: np.ndarray) -> str:
        start = np.array([self.prompt[:1]], dtype=np.int64)
        return search.likeliest_language(OnnxDecoder(self, window[np.newaxis]).step(start)[0], self.spelling)

    def word_starts(self, windows: np.ndarray, frames: Sequence[int], texts: Sequence[str]) -> list[list[float]]:
        spelled = [self.spelling.ids(text) for text in texts]
        longest = self.text_positions - len(self.prompt)
        rows = [n for n, (ids, _) in enumerate(spelled) if self.can_align and 0 < len(ids) <= longest]
        starts: list[list[float]] = [[] for _ in texts]
        if not rows:
            return starts
        cross = self.states.of(windows)
        if len(rows) < len(windows):
            cross = {name: state[rows] for name, state in cross.items()}
        tokens = np.full((len(rows), len(self.prompt) + max(len(spelled[n][0]) for n in rows)), self.spelling.end)
        for row, n in zip(tokens, rows, strict=True):
            row[: len(self.prompt) + len(spelled[n][0])] = [*self.prompt, *spelled[n][0]]
        inputs = {"tokens": tokens.astype(np.int64), **self.empty_past(len(rows), cross), **cross}
        inputs |= self.layout(np.arange(len(rows)), len(rows))
        (cross_attention,) = self.decoder.run(["attention"], inputs)
        for position, n in enumerate(rows):
            ids, firsts = spelled[n]
            attention = cross_attention[:, position, : len(self.prompt) + len(ids)]
            starts[n] = word_timestamps.word_starts(attention, len(self.prompt), frames[n], firsts)
        return starts

    def attention(self, window: np.ndarray, n_frames: int, text: str) -> np.ndarray:
        """Return the attention with which each token of `text`, and the end, is written (AttentiveEngine)."""
        cross, (ids, _) = self.states.of(window[np.newaxis]), self.spelling.ids(text)
        tokens = np.array([[*self.prompt, *ids]], dtype=np.int64)
        inputs = {"tokens": tokens, **self.empty_past(1, cross), **cross, **self.layout(np.zeros(1, dtype=np.int64), 1)}
        (weights,) = self.decoder.run(["attention"], inputs)
        return word_timestamps.attention_of_text(weights[:, 0], len(self.prompt), n_frames)

    def encode(self, windows: np.ndarray) -> States:
        """Return the cross-attention keys and values of `windows` float [B, n_mels, T]."""
        states = self.encoder.run(None, {"features": np.ascontiguousarray(windows, dtype=np.float32)})
        return dict(zip(self.cross_names, states, strict=True))

    def empty_past(self, batch: int, cross: States) -> States:
        """Return keys and values of no tokens."""
        _, heads, width, _ = cross["key_0"].shape
        shapes = {"key": (batch, heads, width, 0), "value": (batch, heads, 0, width)}
        return {name: np.zeros(shapes[name.split("_")[1]], dtype=np.float32) for name in self.past_names}

    def layout(self, owners: np.ndarray, n_windows: int) -> States:
        """Return the decoder's inputs `window_rows` and `slots` for rows of the windows `owners` int64, ascending."""
        if not self.texts_share_windows:
            return {}
        counts = np.bincount(owners, minlength=n_windows)
        firsts = np.cumsum(counts) - counts
        columns = np.arange(len(owners)) - firsts[owners]
        window_rows = np.zeros((len(counts), counts.max()), dtype=np.int64)
        window_rows[owners, columns] = np.arange(len(owners))
        return {"window_rows": window_rows, "slots": owners * counts.max() + columns}


class OnnxDecoder:
    """The decoder's keys and values for a batch of texts that grow (search.TextDecoder)."""

    def __init__(self, engine: Onnx, windows: np.ndarray):
        self.engine = engine
        self.cross = engine.states.of(windows)
        self.past = engine.empty_past(len(windows), self.cross)
        self.owners = np.arange(len(windows))
        """The window of each row."""

    def step(self, tokens: np.ndarray) -> np.ndarray:
        layout = self.engine.layout(self.owners, len(self.cross["key_0"]))
        inputs = {"tokens": tokens.astype(np.int64), **self.past, **self.cross, **layout}
        logits, *present = self.engine.decoder.run(["logits", *self.engine.present_names], inputs)
        self.past = dict(zip(self.engine.past_names, present, strict=True))
        return logits

    def select(self, rows: np.ndarray) -> None:
        if np.array_equal(rows, np.arange(len(self.owners))):
            return
        self.past = {name: state[rows] for name, state in self.past.items()}
        self.owners = self.owners[rows]
        unfinished, owners = np.unique(self.owners, return_inverse=True)
        if not self.engine.texts_share_windows:
            unfinished, owners = rows, np.arange(len(rows))
        elif len(unfinished) > _MAX_COPIED_SHARE * len(self.cross["key_0"]):
            return  # computing finished windows takes less time than copying the others
        self.cross = {name: state[unfinished] for name, state in self.cross.items()}
        self.owners = owners


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
