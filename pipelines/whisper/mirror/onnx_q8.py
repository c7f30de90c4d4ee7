"""Read int8 ONNX exports of Whisper as approximate float32 parameters under transformers' names (q8)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.infra.errors import LabError, missing_package

if TYPE_CHECKING:
    import numpy as np


def dequantise(quantised: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, axis: int) -> np.ndarray:
    """Return `(q - zero_point) * scale` in float32.

    `scale` and `zero_point` are scalars (one for the tensor) or vectors along `axis` (one per channel).
    Source: ONNX operator DequantizeLinear.
    """
    import numpy as np

    def along_axis(values: np.ndarray) -> np.ndarray:
        values = values.astype(np.float32)
        if values.size == 1:
            return values.reshape(())
        shape = [1] * quantised.ndim
        shape[axis] = -1
        return values.reshape(shape)

    return (quantised.astype(np.float32) - along_axis(zero_point)) * along_axis(scale)


def parameters(raw: Path) -> dict[str, np.ndarray]:
    """Return the parameters of the encoder's and the (merged) decoder's file in `raw` by transformers' names."""
    encoder = read_onnx(raw / "encoder_model_quantized.onnx", prefix="model.encoder.")
    return encoder | read_onnx(raw / "decoder_model_merged_quantized.onnx", prefix="")


def read_onnx(path: Path, prefix: str) -> dict[str, np.ndarray]:
    """Return all parameters of an export quantised by onnxruntime's dynamic quantisation: float32, shapes as in torch.

    Biases, norms, embeddings and convolutions have their parameter names. The weight of a linear layer is called
    `onnx::MatMul_<number>` and is stored transposed; its name comes from the node that multiplies by it. `prefix` is
    prepended to every name: the encoder was exported alone, so its names lack `model.encoder.`.
    """
    from onnx import numpy_helper

    graph = _load_onnx(path)
    stored = {tensor.name: tensor for tensor in graph.initializer}
    linear = _linear_weights(graph, stored.keys())
    parameters = {}
    for name, tensor in stored.items():
        # a leading slash marks a constant of the graph (a shape); scales and zero points are read with their tensor
        if name.startswith("/") or name.endswith(("_scale", "_zero_point")):
            continue
        array = numpy_helper.to_array(tensor)
        if name.endswith("_quantized"):
            stem = name.removesuffix("_quantized")
            scale, zero_point = (numpy_helper.to_array(stored[stem + end]) for end in ("_scale", "_zero_point"))
            # one scale per output channel: the last axis of a MatMul's weight, the first of a convolution's
            array = dequantise(array, scale, zero_point, axis=-1 if name in linear else 0)
        parameters[prefix + (linear.get(name) or _plain_name(name))] = array.T.copy() if name in linear else array
    return parameters


def _plain_name(initialiser: str) -> str:
    """Remove the suffixes that quantisation and merging the two decoders appended."""
    return re.sub(r"_merged_\d+$", "", initialiser.removesuffix("_quantized"))


def _linear_weights(graph, stored: set[str]) -> dict[str, str]:
    """Map anonymous initialisers to parameter names, from nodes like `/layers.0/self_attn/q_proj/MatMul_quant`."""
    return {
        node.input[1]: node.name.strip("/").rsplit("/", 1)[0].replace("/", ".") + ".weight"
        for node in _nodes(graph)
        if node.op_type in ("MatMul", "MatMulInteger") and node.input[1] in stored
    }


def _nodes(graph) -> Iterator:
    """Yield the nodes of a graph and of its branches: the merged decoder has its layers in the branches of an If."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)


def _load_onnx(path: Path):
    onnx = import_onnx()
    try:
        return onnx.load(path, load_external_data=False).graph
    except Exception as error:  # protobuf's DecodeError, whose module differs between versions
        raise LabError(f"{path.name} is not a readable ONNX file ({error}). Run this again to download it") from error


def import_onnx():
    try:
        import onnx
    except ImportError as error:
        raise missing_package("onnx", "onnx>=1.16", "reading quantised (@q8) weights") from error
    return onnx
