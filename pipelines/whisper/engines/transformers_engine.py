"""Decoding by transformers, on whatever device torch has."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np

from pipelines.speech.audio import Waveform
from pipelines.whisper import decoding
from pipelines.whisper import log_mel as features
from pipelines.whisper import model as whisper_model
from pipelines.whisper.decoding import DecodingOptions, Hypothesis
from pipelines.whisper.log_mel import LogMel
from pipelines.whisper.model import ModelRef


class Transformers:
    """The model in float32 (bfloat16 by autocast on GPUs that have it)."""

    def __init__(self, ref: ModelRef, language: str, device: str, threads: int, max_new_tokens: int):
        import torch

        if threads:
            torch.set_num_threads(threads)
        self.model = whisper_model.load(ref, device=device).eval()
        self.processor = whisper_model.load_processor(ref, language)
        self.options = DecodingOptions(language, max_new_tokens, word_logprobs=True)
        self.name = f"transformers {device} {'bfloat16' if decoding.in_bfloat16(self.model) else 'float32'}"
        self.n_mels = self.model.config.num_mel_bins
        if "spaces" in sys.modules:  # Hugging Face ZeroGPU attaches a GPU for the length of a decorated call
            on_gpu = sys.modules["spaces"].GPU
            self.decode, self.no_speech = on_gpu(self.decode), on_gpu(self.no_speech)

    def log_mel(self, waveform: Waveform) -> LogMel:
        return features.extract(waveform, self.n_mels)

    def decode(self, windows: np.ndarray, temperature: float = 0.0, seed: int = 0) -> list[Hypothesis]:
        import torch

        options = replace(self.options, temperature=temperature, seed=seed)
        return decoding.decode(self.model, self.processor, torch.from_numpy(windows), options)

    def word_starts(self, window: np.ndarray, frames: int, text: str) -> list[float]:
        return []  # its fast attention does not tell where it looks

    def no_speech(self, windows: np.ndarray) -> list[float]:
        import torch

        return decoding.no_speech(self.model, self.processor, torch.from_numpy(windows), language=self.options.language)
