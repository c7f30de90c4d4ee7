"""Decode with transformers on any torch device: CPU, CUDA, MPS, ZeroGPU."""

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
    """A loaded model in float32, with bfloat16 autocast on GPUs that support it."""

    def __init__(self, ref: ModelRef, options: DecodingOptions, device: str, threads: int):
        import torch

        if threads:
            torch.set_num_threads(threads)
        self.model = whisper_model.load(ref, device=device).eval()
        self.processor = whisper_model.load_processor(ref, options.language)
        self.options = options
        self.name = f"transformers {device} {'bfloat16' if decoding.uses_bfloat16(self.model) else 'float32'}"
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
        return []  # its fast attention does not return weights

    def no_speech(self, windows: np.ndarray) -> list[float]:
        import torch

        return decoding.no_speech(self.model, self.processor, torch.from_numpy(windows), language=self.options.language)
