"""Keep the encoder's states of windows as long as the caller keeps their features."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

import numpy as np

_States = TypeVar("_States")


class EncoderStates(Generic[_States]):
    """The states of arrays of features: to decode one again, or to align its texts, does not encode it again."""

    def __init__(self, encode: Callable[[np.ndarray], _States]):
        self._encode = encode
        self._kept: dict[int, tuple[weakref.ref[np.ndarray], _States]] = {}

    def of(self, features: np.ndarray) -> _States:
        """Return the states of `features` float [B, n_mels, T], which must not be changed between two calls.

        They are freed when the caller frees the array.
        """
        key = id(features)
        if key not in self._kept:
            states = self._encode(features)
            self._kept[key] = weakref.ref(features, lambda _: self._kept.pop(key, None)), states
        return self._kept[key][1]
