"""Build the optimizer of a recipe: groups of weights with their own decay and learning rate, and what updates them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from pipelines.infra import environment
from pipelines.infra.errors import LabError, missing_package
from pipelines.recipes.training_settings import TrainingSettings

if TYPE_CHECKING:
    import torch

Named = list[tuple[str, Any]]
"""Names and weights of a model."""
_LAYER = re.compile(r"\b(encoder|decoder)\.layers\.(\d+)\.")
_AFTER_LAYERS = re.compile(r"\b(?:encoder|decoder)\.layer_norm\.")
_STACK = re.compile(r"\b(encoder|decoder)\.")
_MUON_MOMENTUM = 0.95
"""Momentum of Jordan et al. (2024) and default of torch."""


def build(settings: TrainingSettings, model: Any) -> torch.optim.Optimizer:
    """Build the optimizer of the trainable weights; biases and layer norms have no weight decay.

    Raises LabError if the optimizer's package, torch version or device is missing.
    """
    import torch

    trained = [(name, weights) for name, weights in model.named_parameters() if weights.requires_grad]
    rates = _rates(trained, settings)
    groups = _groups(trained, rates, settings.weight_decay)
    betas = settings.beta1, settings.beta2
    if settings.optimizer == "adafactor":
        return torch.optim.Adafactor(groups, lr=settings.learning_rate)
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.beta1)
    if settings.optimizer == "adamw8bit":
        return _adamw_8bit(model, groups, settings.learning_rate, betas)
    if settings.optimizer == "muon":
        return _muon(trained, rates, settings)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, eps=1e-8, fused=True)


def _groups(named: Named, rates: dict[str, float], weight_decay: float) -> list[dict[str, Any]]:
    """Return parameter groups, those of the highest learning rate first, which is the one that is logged.

    With one rate they are the matrices, then the vectors, each in the model's order: checkpoints number them so.
    """
    groups = []
    for rate in sorted(set(rates.values()), reverse=True):
        of_rate = [weights for name, weights in named if rates[name] == rate]
        for part, decay in (
            ([weights for weights in of_rate if weights.ndim > 1], weight_decay),
            ([weights for weights in of_rate if weights.ndim <= 1], 0.0),
        ):
            if part or len(set(rates.values())) == 1:
                groups.append({"params": part, "weight_decay": decay, "lr": rate})
    return groups


def _rates(named: Named, settings: TrainingSettings) -> dict[str, float]:
    """Return the learning rate of each weight, by name (layer-wise decay; see TrainingSettings.layer_decay).

    A stack whose first layers were left out, as in a student, counts the layers that it has.
    """
    if settings.layer_decay == 1:
        return dict.fromkeys((name for name, _ in named), settings.learning_rate)
    n_layers: dict[str, int] = {}
    for name, _ in named:
        if found := _LAYER.search(name):
            n_layers[found[1]] = max(n_layers.get(found[1], 0), int(found[2]) + 1)
    return {name: settings.learning_rate * settings.layer_decay ** _below_top(name, n_layers) for name, _ in named}


def _below_top(name: str, n_layers: dict[str, int]) -> int:
    """Return how many layers lie above a weight in its stack: 0 for the last layer and the norm after it."""
    if found := _LAYER.search(name):
        return n_layers[found[1]] - 1 - int(found[2])
    stack = _STACK.search(name)
    return 0 if stack is None or _AFTER_LAYERS.search(name) else n_layers.get(stack[1], 0)


def _adamw_8bit(
    model: Any, groups: list[dict[str, Any]], learning_rate: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """Build AdamW of bitsandbytes; embeddings keep 32 bits, as its documentation advises."""
    if environment.detect().device != "cuda":
        raise LabError(
            "training.optimizer = 'adamw8bit' needs a GPU of NVIDIA, and this machine has none: take 'adamw', or "
            "'adafactor', which needs less memory too"
        )
    import torch

    try:
        import bitsandbytes
    except ImportError:
        raise missing_package("bitsandbytes", "bitsandbytes>=0.46", "training.optimizer = 'adamw8bit'") from None
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            bitsandbytes.optim.GlobalOptimManager.get_instance().register_module_override(
                module, "weight", {"optim_bits": 32}
            )
    return bitsandbytes.optim.AdamW8bit(groups, lr=learning_rate, betas=betas, eps=1e-8)


def _muon(named: Named, rates: dict[str, float], settings: TrainingSettings) -> torch.optim.Optimizer:
    """Build Muon for the matrices of the layers, and AdamW for all other weights.

    With the factor of Liu et al. (2025) the steps of Muon are as large as AdamW's, so both have one learning rate and
    one weight decay.
    """
    import torch

    if not hasattr(torch.optim, "Muon"):
        raise LabError(
            f"training.optimizer = 'muon' needs torch 2.9 or newer, this is {torch.__version__}: take 'adamw', or run: "
            "pip install 'torch>=2.9'"
        )
    hidden = [(name, weights) for name, weights in named if weights.ndim == 2 and _LAYER.search(name)]
    names = {name for name, _ in hidden}
    others = [(name, weights) for name, weights in named if name not in names]
    parts: list[torch.optim.Optimizer] = []
    if hidden:
        decay, shared = settings.weight_decay, {"lr": settings.learning_rate}
        groups = [group for group in _groups(hidden, rates, decay) if group["params"]]
        parts.append(
            torch.optim.Muon(
                groups, momentum=_MUON_MOMENTUM, adjust_lr_fn="match_rms_adamw", weight_decay=decay, **shared
            )
        )
    if others:
        groups, betas = _groups(others, rates, settings.weight_decay), (settings.beta1, settings.beta2)
        parts.append(torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, eps=1e-8, fused=True))
    return _combined(parts)


def _combined(parts: Iterable[torch.optim.Optimizer]) -> torch.optim.Optimizer:
    """Return one optimizer that steps all of `parts`, whose groups and states it has as its own.

    So schedules, gradient clipping and checkpoints see one optimizer with torch's own state.
    """
    import torch

    class MuonWithAdamW(torch.optim.Optimizer):
        def __init__(self, parts: list[torch.optim.Optimizer]):
            self.parts = parts
            super().__init__([group for part in parts for group in part.param_groups], {})
            self._share()

        def _share(self) -> None:
            """Give each part its groups, and all parts one state, which is keyed by weights."""
            start = 0
            for part in self.parts:
                end = start + len(part.param_groups)
                part.param_groups, part.state, start = self.param_groups[start:end], self.state, end

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict(state_dict)
            self._share()

        def step(self, closure: Callable[[], float] | None = None) -> float | None:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            for part in self.parts:
                part.step()
            return loss

    return MuonWithAdamW(list(parts))
