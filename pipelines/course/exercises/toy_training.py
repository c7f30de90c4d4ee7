"""A training loop of twenty lines, whose state can be saved in part: exercise 2 breaks a resume with it."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

STATE = ("weights", "momentum", "step", "order", "random_state", "losses")
_CLIPS, _FEATURES, _BATCH = 12, 4, 2
_PEAK, _MOMENTUM = 0.05, 0.9


def start() -> dict[str, Any]:
    """Return the state before the first step."""
    return {
        "weights": np.zeros(_FEATURES),
        "momentum": np.zeros(_FEATURES),
        "step": 0,
        "order": [],
        "random_state": np.random.default_rng(7).bit_generator.state,
        "losses": [],
    }


def train(state: dict[str, Any], steps: int) -> dict[str, Any]:
    """Train a linear model until `steps` steps are done; return the new state.

    `order` holds the clips that are left in this epoch. The learning rate falls with `step`. Noise is added to each
    batch, as augmentation does, from `random_state`. `losses` is only written.
    """
    state = copy.deepcopy(state)
    random = np.random.default_rng()
    random.bit_generator.state = state["random_state"]
    inputs = np.random.default_rng(1).normal(size=(_CLIPS, _FEATURES))
    targets = inputs @ np.arange(1.0, _FEATURES + 1)
    while state["step"] < steps:
        if not state["order"]:
            state["order"] = random.permutation(_CLIPS).tolist()
        batch = [state["order"].pop(0) for _ in range(_BATCH)]
        noisy = inputs[batch] + random.normal(scale=0.1, size=(_BATCH, _FEATURES))
        errors = noisy @ state["weights"] - targets[batch]
        rate = _PEAK / (1 + state["step"])
        state["momentum"] = _MOMENTUM * state["momentum"] + noisy.T @ errors / _BATCH
        state["weights"] = state["weights"] - rate * state["momentum"]
        state["losses"].append(float(np.square(errors).mean()))
        state["step"] += 1
    state["random_state"] = random.bit_generator.state
    return state


def resume(kept: set[str], interrupted_at: int, steps: int) -> dict[str, Any]:
    """Train, lose everything that is not in `kept`, and train on; return the final state."""
    interrupted = train(start(), interrupted_at)
    return train({name: interrupted[name] if name in kept else value for name, value in start().items()}, steps)
