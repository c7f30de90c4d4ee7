"""Read the configuration of a base model without its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines.infra import environment
from pipelines.infra.errors import LabError
from pipelines.infra.stores import is_local_path
from pipelines.recipes.settings import Recipe
from pipelines.whisper import hub_models
from pipelines.whisper import model as whisper_model

SIZES = {
    "tiny": (384, 4, 4, 80, 51_865),
    "base": (512, 6, 6, 80, 51_865),
    "small": (768, 12, 12, 80, 51_865),
    "medium": (1024, 24, 24, 80, 51_865),
    "large": (1280, 32, 32, 80, 51_865),
    "large-v2": (1280, 32, 32, 80, 51_865),
    "large-v3": (1280, 32, 32, 128, 51_866),
    "large-v3-turbo": (1280, 32, 4, 128, 51_866),
}
"""OpenAI's multilingual models: width, encoder layers, decoder layers, mel bands, tokens."""
_HEAD_WIDTH = 64


def of_size(size: str, **changes: Any) -> Any:
    """Return the WhisperConfig of one of SIZES."""
    from transformers import WhisperConfig

    width, encoder_layers, decoder_layers, n_mels, vocabulary = SIZES[size]
    heads, ffn = width // _HEAD_WIDTH, 4 * width
    return WhisperConfig(
        d_model=width,
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=ffn,
        decoder_ffn_dim=ffn,
        num_mel_bins=n_mels,
        vocab_size=vocabulary,
        **changes,
    )


def of_recipe(recipe: Recipe) -> Any:
    """Return the WhisperConfig of the model that a recipe starts from: its base, or the teacher of its student."""
    teacher = recipe.distillation.teacher
    config = of_uri(recipe.model.base if teacher.startswith("run:") or not teacher else teacher)
    config.dropout = recipe.model.dropout
    return config


def of_uri(uri: str) -> Any:
    """Return the WhisperConfig of a model's URI; raise LabError if it is not known and cannot be fetched."""
    from transformers import WhisperConfig

    name, _, revision = uri.removeprefix("hub://").partition("@")
    size = name.removeprefix("openai/whisper-")
    if not is_local_path(uri) and size in SIZES and name != size:
        return of_size(size)
    try:
        return WhisperConfig.from_pretrained(_folder(uri, name, revision or None))
    except (OSError, ValueError) as error:
        raise LabError(f"{uri} has no readable config.json: {str(error).splitlines()[0]}. Name another model") from None


def _folder(uri: str, name: str, revision: str | None) -> Path:
    """Return a folder with the model's config.json; of a model of the Hub only that file is downloaded."""
    from huggingface_hub import hf_hub_download

    if is_local_path(uri) or uri.startswith("hopsworks://"):
        return whisper_model.resolve(uri).folder
    if folder := hub_models.cached(name, revision):
        return folder
    if not environment.hub_reachable():
        raise LabError(f"{uri} is not on this machine, and {environment.hub_unreachable_reason()}. Name a folder")
    return Path(hf_hub_download(name, "config.json", revision=revision)).parent
