"""Read ggml, the format of whisper.cpp: float16 weights under OpenAI's names, converted to float32 without loss."""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.infra.errors import LabError

if TYPE_CHECKING:
    import numpy as np


MAGIC = 0x67676D6C
_DTYPES = {0: "<f4", 1: "<f2"}
# fmt: off
HEADER = (
    "n_vocab", "n_audio_ctx", "n_audio_state", "n_audio_head", "n_audio_layer",
    "n_text_ctx", "n_text_state", "n_text_head", "n_text_layer", "n_mels", "ftype",
)
# fmt: on

# OpenAI's module names -> transformers' names, applied in this order.
_NAMES = (
    (r"^", "model."),
    (r"positional_embedding$", "embed_positions.weight"),
    (r"token_embedding", "embed_tokens"),
    (r"\.(ln_post|ln)\.", ".layer_norm."),
    (r"\.blocks\.", ".layers."),
    (r"\.mlp_ln\.", ".final_layer_norm."),
    (r"\.mlp\.0\.", ".fc1."),
    (r"\.mlp\.2\.", ".fc2."),
    (r"\.cross_attn_ln\.", ".encoder_attn_layer_norm."),
    (r"\.attn_ln\.", ".self_attn_layer_norm."),
    (r"\.cross_attn\.", ".encoder_attn."),
    (r"\.attn\.", ".self_attn."),
    (r"\.(query|key|value)\.", lambda match: f".{match[1][0]}_proj."),
    (r"\.out\.", ".out_proj."),
)


@dataclass(frozen=True)
class Ggml:
    """The content of a whisper.cpp model file without its vocabulary."""

    header: dict[str, int]
    mel_filters: np.ndarray
    """[n_mels, n_fft // 2 + 1] float32."""
    tensors: dict[str, np.ndarray]
    """OpenAI's parameter names, shapes as in torch, float32."""


def read_ggml(path: Path) -> Ggml:
    """Read a ggml file of float32 and float16 tensors. Raises LabError if it is truncated or not a ggml file.

    Layout (little-endian): magic; 11 int32; mel filters (2 int32, float32 data); vocabulary (count, then length and
    bytes of each); tensors to the end of the file (number of dims, name length, type; dims reversed; name; data).
    Source: whisper.cpp, models/convert-pt-to-ggml.py.
    """
    import numpy as np

    with path.open("rb") as file:
        if _counts(file, 1, "the magic number") != (MAGIC,):
            raise LabError(f"{path.name} is no ggml file: it does not begin with the magic number 0x{MAGIC:x}")
        header = dict(zip(HEADER, _counts(file, len(HEADER), "the header"), strict=True))
        n_mels, n_bins = _counts(file, 2, "the header")
        filters = np.frombuffer(_exactly(file, 4 * n_mels * n_bins, "the mel filters"), "<f4").reshape(n_mels, n_bins)
        for _ in range(*_counts(file, 1, "the vocabulary")):
            _exactly(file, *_counts(file, 1, "the vocabulary"), "the vocabulary")
        return Ggml(header, filters, dict(_tensors(file)))


def _tensors(file: BufferedReader) -> Iterator[tuple[str, np.ndarray]]:
    import numpy as np

    while file.peek(1):
        n_dims, name_length, kind = _counts(file, 3, "a tensor header")
        shape = _counts(file, n_dims, "a tensor header")[::-1]
        name = _exactly(file, name_length, "a tensor name").decode("utf-8", "replace")
        if kind not in _DTYPES:
            raise LabError(f"tensor {name} in {Path(file.name).name} has ggml type {kind}; only f32 and f16 are exact")
        dtype = np.dtype(_DTYPES[kind])
        data = _exactly(file, math.prod(shape) * dtype.itemsize, f"tensor {name}")
        yield name, np.frombuffer(data, dtype).reshape(shape).astype(np.float32)


def _counts(file: BufferedReader, n: int, what: str) -> tuple[int, ...]:
    """Read `n` int32. All of this format's are sizes or types, so a negative value means a damaged file."""
    values = struct.unpack(f"<{n}i", _exactly(file, 4 * n, what))
    if min(values, default=0) < 0:
        raise LabError(
            f"{Path(file.name).name} is damaged in {what}: it gives {min(values)} as a size. Download it again"
        )
    return values


def _exactly(file: BufferedReader, n_bytes: int, what: str) -> bytes:
    """Read `n_bytes`. A damaged length must not read to the end of the file or allocate terabytes."""
    left = os.fstat(file.fileno()).st_size - file.tell()
    if not 0 <= n_bytes <= left:
        raise LabError(
            f"{Path(file.name).name} is cut short or damaged in {what}: expected {n_bytes} bytes there, {left} are "
            "left. Download it again"
        )
    return file.read(n_bytes)


def hf_name(openai_name: str) -> str:
    """Return transformers' name of a parameter, `decoder.blocks.0.attn.query.weight` -> `model.decoder.layers.0...`."""
    for pattern, replacement in _NAMES:
        openai_name = re.sub(pattern, replacement, openai_name)
    return openai_name


def parameters(raw: Path, model: Path) -> dict[str, np.ndarray]:
    """Return the parameters of the ggml file in `raw` by transformers' names, float32."""
    (path,) = raw.glob("*.bin")
    ggml = read_ggml(path)
    _check_heads(ggml.header, json.loads((model / "config.json").read_text(encoding="utf-8")))
    # whisper.cpp stores a convolution's bias as a column [n, 1], torch as [n]
    return {
        hf_name(name): array[:, 0] if re.search(r"conv\d\.bias$", name) and array.ndim == 2 else array
        for name, array in ggml.tensors.items()
    }


def _check_heads(header: dict[str, int], config: dict) -> None:
    """Raise LabError if the numbers of attention heads differ: no tensor's shape depends on them."""
    for ggml_key, key in (("n_audio_head", "encoder_attention_heads"), ("n_text_head", "decoder_attention_heads")):
        if header[ggml_key] != config[key]:
            raise LabError(
                f"weights and config.json disagree: {ggml_key} is {header[ggml_key]}, {key} is {config[key]}"
            )
