"""Audio in a cell of a data set: encoded bytes, a path, or decoded samples with their rate."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from pipelines.speech.audio import AudioError


def parse(cell: Any, rate_hz: Any = None) -> bytes | str | None:
    """Return the encoded audio in a cell, else the path in it, else None.

    Accepts bytes, a path, `{bytes, path}`, `{array, sampling_rate, path}`, and samples [n], [channels, n] or
    [n, channels] at `rate_hz`; they become a WAV file. Raises AudioError with reason `unreadable` for others.
    """
    if isinstance(cell, Mapping):
        if cell.get("bytes"):
            return bytes(cell["bytes"])
        if cell.get("array") is not None:
            return encode(cell["array"], cell.get("sampling_rate") or rate_hz)
        return parse(cell.get("path"))
    if isinstance(cell, bytes | bytearray | memoryview):
        return bytes(cell)
    if isinstance(cell, list | np.ndarray):
        return encode(cell, rate_hz)
    if cell is None or isinstance(cell, str):
        return cell or None
    raise AudioError("unreadable", f"the row contains {str(cell)[:60]} instead of a path or audio")


def encode(samples: Any, rate_hz: Any) -> bytes:
    """Return a WAV file of float samples, or of integers of 16 or 32 bits, without loss of precision."""
    import soundfile

    if not rate_hz:
        raise AudioError("unreadable", "the row contains decoded samples without their sampling rate")
    try:
        values = np.array(samples)
        values = values.astype(np.float32) if values.dtype.kind not in "iu" else values
    except (TypeError, ValueError):
        detail = "the row contains samples that are no numbers, or channels of unequal length"
        raise AudioError("unreadable", detail) from None
    if values.ndim > 2:
        raise AudioError("unreadable", f"the row contains samples with {values.ndim} dimensions")
    if values.ndim == 2 and values.shape[0] < values.shape[1]:
        values = values.T
    subtype = "FLOAT"
    if values.dtype.kind in "iu":
        subtype = "PCM_16" if not values.size or np.abs(values.astype(np.int64)).max() <= 1 << 15 else "PCM_32"
        values = values.astype(np.int16 if subtype == "PCM_16" else np.int32)
    file = io.BytesIO()
    soundfile.write(file, values, int(rate_hz), format="WAV", subtype=subtype)
    return file.getvalue()
