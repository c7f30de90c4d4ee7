"""Fields of a model's config.json that change its outputs or its training although the weights are the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_USUAL_CONFIG = {
    **dict.fromkeys(("attention_dropout", "activation_dropout", "encoder_layerdrop", "decoder_layerdrop"), 0.0),
    "activation_function": "gelu",
    "scale_embedding": False,
}
"""Fields of config.json that change outputs or training with the same weights, with the values of all published Whisper
models. `dropout` is a setting of the recipe."""
_HEADS, _HEAD_WIDTH = ("encoder_attention_heads", "decoder_attention_heads"), 64
"""Published models have one head for 64 channels."""
_USUAL_MASKING = {
    "mask_time_prob": 0.05,
    "mask_time_length": 10,
    "mask_time_min_masks": 2,
    "mask_feature_length": 10,
    "mask_feature_min_masks": 0,
}


def unusual(folder: Path) -> dict[str, Any]:
    """Return the fields that differ from those of all published Whisper models: `config.<name>` to value."""
    config = _read(folder)
    width = config.get("d_model", 0)
    heads = dict.fromkeys(_HEADS, width // _HEAD_WIDTH) if width and width % _HEAD_WIDTH == 0 else {}
    return _differing(config, _USUAL_CONFIG | heads)


def unusual_masking(folder: Path) -> dict[str, Any]:
    """Return the settings of SpecAugment that are unusual. They change training with `model.spec_augment` only."""
    return _differing(_read(folder), _USUAL_MASKING)


def _differing(config: dict[str, Any], usual: dict[str, Any]) -> dict[str, Any]:
    return {f"config.{name}": config[name] for name, value in usual.items() if config.get(name, value) != value}


def _read(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):  # loading the model reports it
        return {}
