"""Choose the weights to tune: all, only the decoder's, or low-rank matrices (LoRA) that are merged at the end.

A LoRA checkpoint has the matrices in peft's format and no weights of the base model; the finished model is a plain
Whisper. The base model's linear layers may have weights in 8 bits during training; the matrices are merged into the
full weights. peft puts its layers inside the modules that `whisper.model.load` prepared, so contexts at clip length
work with it too.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.infra import environment
from pipelines.infra.errors import LabError, missing_package
from pipelines.recipes.training_settings import ModelSettings
from pipelines.whisper import model as whisper_model
from pipelines.whisper.model import ModelRef

if TYPE_CHECKING:
    import torch
    from transformers import WhisperForConditionalGeneration


_WEIGHTS = "adapter_model.safetensors"
_OUTLIERS = 6.0
"""Inputs beyond this size are multiplied in half precision, as in LLM.int8."""
_IN_THE_ENCODER = r"(.*\.)?encoder\..*"
"""Pattern of the encoder's layers; the decoder's cross-attention is called encoder_attn and does not match."""


def prepare(model: WhisperForConditionalGeneration, settings: ModelSettings) -> Any:
    """Freeze the encoder and add LoRA layers as the settings say; return the model or peft's wrapper of it."""
    if settings.freeze_encoder:
        freeze(model.model.encoder)
    if settings.load_in_8bit:
        _use_8bit_linears(model.model)
    if settings.adapter != "lora":
        return model
    wrapped = _with_lora(model, settings)
    if drops_layers(model):
        _keep_gradient(wrapped)
    return wrapped


def drops_layers(model: WhisperForConditionalGeneration) -> bool:
    """Return True if a training step may skip layers, as the recipe or the base model's config.json says."""
    return model.model.encoder.layerdrop > 0 or model.model.decoder.layerdrop > 0


def _keep_gradient(model: torch.nn.Module) -> None:
    """Add 0 times a trained matrix to the logits of `model`: a step that skips all trained layers has a gradient, 0.

    Without one, `backward`, the scaler of float16 and the other processes of a distributed run fail.
    """
    anchor = next(weights for weights in model.parameters() if weights.requires_grad)

    def add_zero(_: Any, __: Any, outputs: Any) -> Any:
        outputs.logits = outputs.logits + 0 * anchor.sum().to(outputs.logits.dtype)
        return outputs

    model.register_forward_hook(add_zero)


def freeze(module: torch.nn.Module) -> None:
    """Switch off gradients and dropout in `module`; its forward pass then stores no activations."""
    module.requires_grad_(False)
    for part in module.modules():
        for name in ("dropout", "attention_dropout", "activation_dropout", "layerdrop"):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.0)


def unwrap(model: Any) -> WhisperForConditionalGeneration:
    """Return the Whisper inside peft's wrapper, with its LoRA layers; an unwrapped model is returned as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def load_checkpoint(checkpoint: Path, base: ModelRef) -> WhisperForConditionalGeneration:
    """Load a checkpoint as a plain Whisper; an adapter's matrices are merged into the weights of `base`."""
    if not (checkpoint / _WEIGHTS).exists():
        return whisper_model.load(ModelRef("checkpoint", checkpoint, "folder", checkpoint.name))
    return _peft().PeftModel.from_pretrained(whisper_model.load(base), checkpoint).merge_and_unload()


def _use_8bit_linears(model: torch.nn.Module) -> None:
    """Replace the linear layers by those of bitsandbytes, which quantise their weights when they move to the GPU."""
    import torch

    bitsandbytes = _bitsandbytes()
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, torch.nn.Linear):
                sizes = layer.in_features, layer.out_features, layer.bias is not None
                smaller = bitsandbytes.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=_OUTLIERS)
                smaller.weight = bitsandbytes.nn.Int8Params(layer.weight.data, False, has_fp16_weights=False)
                smaller.bias = layer.bias
                smaller.register_forward_pre_hook(_in_autocast_precision)
                setattr(parent, name, smaller)


def _in_autocast_precision(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Convert the input of an 8-bit layer as autocast does for others; without, its output would be in float32."""
    import torch

    device = inputs[0].device.type
    enabled = torch.is_autocast_enabled(device)
    return (inputs[0].to(torch.get_autocast_dtype(device)),) if enabled else inputs


def _bitsandbytes() -> Any:
    """Return the package; raise LabError if it or an NVIDIA GPU is missing."""
    machine = environment.detect()
    if machine.device != "cuda":
        raise LabError(
            f"model.load_in_8bit needs an NVIDIA GPU, and this machine computes on {machine.device}: set it to false"
        )
    try:
        import bitsandbytes
    except ImportError:
        raise missing_package("bitsandbytes", "bitsandbytes>=0.46", "model.load_in_8bit") from None
    return bitsandbytes


def _with_lora(model: WhisperForConditionalGeneration, settings: ModelSettings) -> Any:
    config = _peft().LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=list(settings.lora_targets),
        exclude_modules=_IN_THE_ENCODER if settings.freeze_encoder else None,
    )
    wrapped = _peft().get_peft_model(model, config)
    # a checkpoint must not contain a local path, and saving it must neither call the Hub nor write a card
    wrapped.peft_config["default"].base_model_name_or_path = ""
    wrapped.create_or_update_model_card = lambda folder: None
    return wrapped


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise missing_package("peft", "peft>=0.20", "model.adapter = 'lora'") from None
    # peft uses an attribute of transformers by its former name
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    return peft
