"""Write ggml, the format of whisper.cpp: OpenAI's names, one file; the reader is mirror/ggml.py.

    f16    matrices in half precision; vectors, biases and positions in float32
    q8_0   matrices in blocks of 32 values: one float16 scale and 32 int8
    q5_0   the same with 5 bits: one float16 scale, 32 high bits, 32 nibbles

Convolutions stay in f16, as in whisper.cpp's own `quantize`. Sources: whisper.cpp, models/convert-h5-to-ggml.py and
examples/quantize; ggml, src/ggml-quants.c (quantize_row_q8_0_ref, quantize_row_q5_0_ref).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.infra.errors import LabError
from pipelines.whisper.mirror.ggml import HEADER, MAGIC, hf_name

if TYPE_CHECKING:
    import numpy as np

PRECISIONS = ("f16", "q8_0", "q5_0")
FILE_NAME = "ggml-model.bin"
FORMAT = "2"
"""Raised whenever the files written for a model change."""
BLOCK = 32
"""Values that share a scale."""
_F32, _F16 = 0, 1
_TENSOR_TYPES = {"f16": _F16, "q8_0": 8, "q5_0": 6}
"""ggml's `ggml_type`."""
_FILE_TYPES = {"f16": 1, "q8_0": 7 + 2 * 1000, "q5_0": 8 + 2 * 1000}
"""ggml's `ggml_ftype`, plus 1000 times the version of the quantised blocks."""
_CONFIG_KEYS = {
    "n_vocab": "vocab_size",
    "n_audio_ctx": "max_source_positions",
    "n_audio_state": "d_model",
    "n_audio_head": "encoder_attention_heads",
    "n_audio_layer": "encoder_layers",
    "n_text_ctx": "max_target_positions",
    "n_text_state": "d_model",
    "n_text_head": "decoder_attention_heads",
    "n_text_layer": "decoder_layers",
    "n_mels": "num_mel_bins",
}
_TEXT_TOKENS = {51864: 50256, 51865: 50257, 51866: 50257}
"""Text tokens by size of the vocabulary: whisper.cpp derives the ids of all special tokens from that size."""
_IN_FLOAT32 = ("encoder.conv1.bias", "encoder.conv2.bias", "encoder.positional_embedding")
_IN_FLOAT32 += ("decoder.positional_embedding",)


def write(model: Path, precision: str, path: Path) -> None:
    """Write the model in the folder `model` (config, tokenizer, safetensors) to `path` in one of PRECISIONS.

    Raises LabError if the precision is quantised and the width no multiple of BLOCK, if a feed-forward layer is not
    four times as wide as the model, if tokenizer.json is missing or no vocabulary of OpenAI's models, or if there are
    weights that the format has no name for.
    """
    config = json.loads((model / "config.json").read_text("utf-8"))
    if precision != "f16" and config["d_model"] % BLOCK:
        raise LabError(
            f"{precision} needs a width that is a multiple of {BLOCK}, got d_model={config['d_model']}: take ggml-f16"
        )
    for part in ("encoder_ffn_dim", "decoder_ffn_dim"):
        if config[part] != 4 * config["d_model"]:
            raise LabError(f"whisper.cpp needs {part} = 4 * d_model = {4 * config['d_model']}, got {config[part]}")
    with path.open("wb") as file:
        values = {name: config[key] for name, key in _CONFIG_KEYS.items()} | {"ftype": _FILE_TYPES[precision]}
        file.write(struct.pack(f"<{1 + len(HEADER)}i", MAGIC, *(values[name] for name in HEADER)))
        filters = _mel_filters(config["num_mel_bins"])
        file.write(struct.pack("<2i", *filters.shape) + filters.tobytes())
        words = _vocabulary(model, config["vocab_size"])
        file.write(struct.pack("<i", len(words)) + b"".join(struct.pack("<i", len(word)) + word for word in words))
        for name, tensor in _tensors(model, config):
            file.write(_tensor_bytes(name, tensor, precision))


def precision_of(path: Path) -> str:
    """Return which of PRECISIONS a file has, by its header."""
    with path.open("rb") as file:
        header = struct.unpack(f"<{1 + len(HEADER)}i", file.read(4 * (1 + len(HEADER))))
    return next(name for name, number in _FILE_TYPES.items() if number == header[1 + HEADER.index("ftype")])


def _mel_filters(n_mels: int) -> np.ndarray:
    """Return Whisper's mel filters, float32 [n_mels, 201]."""
    import numpy as np
    from transformers import WhisperFeatureExtractor

    return np.ascontiguousarray(WhisperFeatureExtractor(feature_size=n_mels).mel_filters.T, dtype="<f4")


def _vocabulary(model: Path, vocab_size: int) -> list[bytes]:
    """Return the bytes of every text token; whisper.cpp adds the special ones itself."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    path = model / "tokenizer.json"
    if not path.is_file():
        raise LabError(f"{model} has no tokenizer.json: save the model's processor again, with save_pretrained")
    tokenizer = json.loads(path.read_text("utf-8"))
    end = next(token["id"] for token in tokenizer["added_tokens"] if token["content"] == "<|endoftext|>")
    if end != _TEXT_TOKENS.get(vocab_size):
        raise LabError(
            f"whisper.cpp knows the vocabularies of OpenAI's models only ({', '.join(map(str, _TEXT_TOKENS))} tokens), "
            f"got {vocab_size} tokens, {end} of them text"
        )
    by_id = {number: word for word, number in tokenizer["model"]["vocab"].items()}
    to_byte = {character: byte for byte, character in bytes_to_unicode().items()}
    return [bytes(to_byte[character] for character in by_id.get(number, "")) for number in range(end)]


def _tensors(model: Path, config: dict) -> Iterator[tuple[str, np.ndarray]]:
    """Yield OpenAI's names and the tensors, float32. The output matrix is that of the token embedding: not stored."""
    import numpy as np
    from safetensors.torch import load_file

    weights = {
        name if name.startswith("model.") else f"model.{name}": tensor
        for name, tensor in load_file(model / "model.safetensors").items()
    }
    output = weights.pop("model.proj_out.weight", None)
    if output is not None and not output.equal(weights["model.decoder.embed_tokens.weight"]):
        raise LabError(f"{model} has a separate output matrix (proj_out.weight), for which ggml has no name")
    names = {hf_name(name): name for name in _openai_names(config)}
    if unknown := sorted(weights.keys() - names.keys()):
        raise LabError(f"{model} has weights that ggml has no name for, such as {unknown[0]}")
    for name, tensor in weights.items():
        yield names[name], np.ascontiguousarray(tensor.float().numpy(), dtype="<f4")


def _openai_names(config: dict) -> Iterator[str]:
    """Yield the names of all parameters that a model of this configuration can have."""
    yield from ("decoder.token_embedding.weight", "encoder.positional_embedding", "decoder.positional_embedding")
    modules = ["encoder.conv1", "encoder.conv2", "encoder.ln_post", "decoder.ln"]
    for part, attentions in (("encoder", ("attn",)), ("decoder", ("attn", "cross_attn"))):
        for layer in range(config[f"{part}_layers"]):
            block = f"{part}.blocks.{layer}"
            modules += [f"{block}.{name}" for name in ("mlp.0", "mlp.2", "mlp_ln")]
            for attention in attentions:
                modules += [f"{block}.{attention}.{name}" for name in ("query", "key", "value", "out")]
                modules.append(f"{block}.{attention}_ln")
    yield from (f"{module}.{kind}" for module in modules for kind in ("weight", "bias"))


def _tensor_bytes(name: str, tensor: np.ndarray, precision: str) -> bytes:
    """Return a tensor with its header: number of dims, length of the name, type, dims reversed, name, data."""
    if name in ("encoder.conv1.bias", "encoder.conv2.bias"):
        tensor = tensor[:, None]  # whisper.cpp adds it to a matrix
    kind = _F32 if tensor.ndim == 1 or name in _IN_FLOAT32 else _F16
    if kind == _F16 and tensor.ndim == 2:
        kind = _TENSOR_TYPES[precision]
    encoded = name.encode()
    header = struct.pack(f"<{3 + tensor.ndim}i", tensor.ndim, len(encoded), kind, *tensor.shape[::-1])
    data = {_F32: tensor.tobytes, _F16: lambda: tensor.astype("<f2").tobytes(), 8: lambda: _q8_0(tensor)}
    return header + encoded + data.get(kind, lambda: _q5_0(tensor))()


def _q8_0(tensor: np.ndarray) -> bytes:
    """Return blocks of a float16 scale and 32 int8: value = scale * int8."""
    import numpy as np

    blocks = tensor.reshape(-1, BLOCK)
    scales = np.abs(blocks).max(axis=1) / np.float32(127)
    integers = _away_from_zero(blocks * _inverse(scales)).astype(np.int8)
    rows = np.empty(len(blocks), dtype=[("scale", "<f2"), ("values", np.int8, BLOCK)])
    rows["scale"], rows["values"] = scales, integers
    return rows.tobytes()


def _q5_0(tensor: np.ndarray) -> bytes:
    """Return blocks of a float16 scale, 32 high bits and 32 nibbles: value = scale * (five bits - 16).

    The nibbles of values j and j + 16 share a byte. The value that is largest in size becomes -16.
    """
    import numpy as np

    blocks = tensor.reshape(-1, BLOCK)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)[:, 0]
    scales = largest / np.float32(-16)
    five_bits = np.minimum(blocks * _inverse(scales) + np.float32(16.5), 31).astype(np.uint8)
    rows = np.empty(len(blocks), dtype=[("scale", "<f2"), ("high", "<u4"), ("low", np.uint8, BLOCK // 2)])
    rows["scale"] = scales
    rows["high"] = ((five_bits >> 4).astype(np.uint32) << np.arange(BLOCK, dtype=np.uint32)).sum(axis=1)
    nibbles = five_bits & 15
    rows["low"] = nibbles[:, : BLOCK // 2] | (nibbles[:, BLOCK // 2 :] << 4)
    return rows.tobytes()


def _inverse(scales: np.ndarray) -> np.ndarray:
    """Return 1 / scale as a column, 0 for a block of zeros."""
    import numpy as np

    return np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)[:, None]


def _away_from_zero(values: np.ndarray) -> np.ndarray:
    """Round halves away from zero, as C's roundf does."""
    import numpy as np

    return np.trunc(values + np.copysign(np.float32(0.5), values))
