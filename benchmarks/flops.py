"""FLOPs of a training step, and the share of a GPU's peak that they are (model FLOPs utilisation)."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from pipelines.features.cache import FeatureCache
from pipelines.recipes.settings import Recipe
from pipelines.whisper import model as whisper_model
from pipelines.whisper.batching import bucketed, padded_frames
from pipelines.whisper.log_mel import FULL_FRAMES

PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "V100": 125e12,
    "T4": 65e12,
}
"""Dense half-precision matrix FLOP per second from NVIDIA's data sheets, by a word of the device's name."""


def peak_of(device: str) -> float:
    """Return the peak FLOP per second of the device with this name; 0 if unknown."""
    return next((peak for name, peak in PEAKS.items() if re.search(rf"\b{name}\b", device)), 0.0)


def flops_per_example(recipe: Recipe, cache: FeatureCache, full: bool) -> float:
    """Return the mean FLOPs to learn from one clip over an epoch; with `full`, batches are padded to 30 s."""
    from transformers import WhisperConfig

    config = WhisperConfig.from_pretrained(whisper_model.resolve(recipe.model.base).folder)
    settings, rows = recipe.training, cache.split("train")
    frames, labels = cache.rows["frames"].to_numpy()[rows], np.array([len(cache.labels(row)) for row in rows])
    total = 0.0
    for batch in bucketed(frames, settings.batch_size, 1 if full else settings.bucket_batches, settings.seed, 0):
        length = FULL_FRAMES if full else padded_frames(int(frames[batch].max()))
        total += len(batch) * flops(config, length, int(labels[batch].max()))
    return total / len(rows)


def flops(config: Any, n_frames: int, n_tokens: int) -> float:
    """Return the FLOPs to learn from one clip: three times those of its forward pass.

    A matrix of m x n takes 2mn at every position that it is applied to, and attention 4 d for every pair of positions
    (Kaplan et al. 2020, section 2.1; with attention: Chowdhery et al. 2022, appendix B). In an encoder-decoder the
    encoder's matrices, and those of cross-attention keys and values, are applied at the n_frames / 2 positions of the
    encoder, the decoder's other matrices at its tokens.
    """
    d, positions = config.d_model, n_frames // 2
    stem = 2 * 3 * d * (config.num_mel_bins * n_frames + d * positions)
    encoder_layer = positions * (2 * (4 * d * d + 2 * d * config.encoder_ffn_dim) + 4 * d * positions)
    keys_values = positions * 2 * 2 * d * d
    matrices = 2 * (6 * d * d + 2 * d * config.decoder_ffn_dim)
    decoder_layer = keys_values + n_tokens * (matrices + 4 * d * (n_tokens + positions))
    forward = stem + config.encoder_layers * encoder_layer + config.decoder_layers * decoder_layer
    return 3.0 * (forward + n_tokens * 2 * d * config.vocab_size)
