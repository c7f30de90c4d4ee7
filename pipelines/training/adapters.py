"""What is tuned: all weights, the decoder's alone, or small matrices (LoRA) that are merged into them at the end.

A LoRA checkpoint holds the matrices in peft's format and no weight of the base model; the finished model is a plain
Whisper. peft's wrapper puts its layers inside the very modules that `models.load` prepared, so contexts at clip length
work as they do without it.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.infra.errors import missing_package
from pipelines.recipes.training_settings import ModelSettings
from pipelines.whisper import model as whisper_model
from pipelines.whisper.model import ModelRef

if TYPE_CHECKING:
    import torch
    from transformers import WhisperForConditionalGeneration


_WEIGHTS = "adapter_model.safetensors"
_IN_THE_ENCODER = r"(.*\.)?encoder\..*"
"""The full names of the encoder's layers; the decoder's attention over the encoder is called encoder_attn."""


def prepare(model: WhisperForConditionalGeneration, settings: ModelSettings) -> Any:
    """The model as it is trained: frozen where the settings say so, wrapped by peft where they name an adapter."""
    if settings.freeze_encoder:
        freeze(model.model.encoder)
    return _with_lora(model, settings) if settings.adapter == "lora" else model


def freeze(module: torch.nn.Module) -> None:
    """Take `module` out of training: no gradients, hence no memory for them in its forward pass, and no dropout."""
    module.requires_grad_(False)
    for part in module.modules():
        for name in ("dropout", "attention_dropout", "activation_dropout", "layerdrop"):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.0)


def bare(model: Any) -> WhisperForConditionalGeneration:
    """The Whisper inside peft's wrapper, adapted layers included; a model without one as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def load_checkpoint(checkpoint: Path, base: ModelRef) -> WhisperForConditionalGeneration:
    """The plain Whisper that a checkpoint amounts to: an adapter's matrices merged into the weights of `base`."""
    if not (checkpoint / _WEIGHTS).exists():
        return whisper_model.load(ModelRef("checkpoint", checkpoint, "folder", checkpoint.name))
    return _peft().PeftModel.from_pretrained(whisper_model.load(base), checkpoint).merge_and_unload()


def _with_lora(model: WhisperForConditionalGeneration, settings: ModelSettings) -> Any:
    config = _peft().LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=list(settings.lora_targets),
        exclude_modules=_IN_THE_ENCODER if settings.freeze_encoder else None,
    )
    wrapped = _peft().get_peft_model(model, config)
    # a checkpoint names no folder of this machine, and saving it asks no Hub and writes no card
    wrapped.peft_config["default"].base_model_name_or_path = ""
    wrapped.create_or_update_model_card = lambda folder: None
    return wrapped


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise missing_package("peft", "peft>=0.20", "model.adapter = 'lora'") from None
    # peft asks transformers for an attribute by the name that it had before
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    return peft
