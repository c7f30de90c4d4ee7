"""Replace a graph's products with weights by integer products: ONNX Runtime's dynamic quantisation, in less time.

A graph computes the same, to the bit, as after `onnxruntime.quantization.quantize_dynamic` (by channel, weights in
QInt8, only products with a constant). That function goes through the channels one by one in Python, and a Whisper has
51,865 of them in its output layer alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx

_LARGEST, _LARGEST_OF_SEVEN_BITS = 127, 64
"""Largest integer of a weight: of the symmetric ranges in onnxruntime.quantization.quant_utils."""


def quantise(plain: Path, path: Path, *, seven_bits: bool) -> None:
    """Write the float32 graph `plain` to `path` with int8 products; `seven_bits` as onnx_graph.needs_seven_bits."""
    import onnx

    model = onnx.load(plain)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    largest, quantised_inputs, replaced, nodes = _LARGEST_OF_SEVEN_BITS if seven_bits else _LARGEST, set(), [], []
    for node in model.graph.node:
        if node.op_type != "MatMul" or node.input[1] not in weights:
            nodes.append(node)
            continue
        values, name = node.input
        if values not in quantised_inputs:  # products of the same input share its integers
            nodes.append(onnx.helper.make_node("DynamicQuantizeLinear", [values], _parts(values)))
            quantised_inputs.add(values)
        nodes += _integer_product(node.output[0], _parts(values), _parts(name))
        replaced.append(name)
    for name in dict.fromkeys(replaced):
        model.graph.initializer.extend(_quantised(weights[name], largest))
    used = {name for node in nodes for name in node.input}
    used_weights = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(used_weights)
    onnx.save(onnx.shape_inference.infer_shapes(model), path)  # with shapes, ONNX Runtime fuses more nodes


def _parts(name: str) -> list[str]:
    """Return the names of a quantised tensor: integers, scale and zero point."""
    return [f"{name}_{part}" for part in ("quantized", "scale", "zero_point")]


def _integer_product(output: str, left: list[str], right: list[str]) -> list[onnx.NodeProto]:
    """Return the nodes that multiply two quantised tensors and write the product in float32 to `output`."""
    from onnx import TensorProto, helper

    integers, product, scale = (f"{output}_{part}" for part in ("integers", "product", "product_scale"))
    return [
        helper.make_node("Mul", [left[1], right[1]], [scale]),
        helper.make_node("MatMulInteger", [left[0], right[0], left[2], right[2]], [integers]),
        helper.make_node("Cast", [integers], [product], to=TensorProto.FLOAT),
        helper.make_node("Mul", [product, scale], [output]),
    ]


def _quantised(tensor: onnx.TensorProto, largest: int) -> list[onnx.TensorProto]:
    """Return integers int8 [n, channels], scales float32 [channels] and zero points, all 0, of weights float32."""
    from onnx import numpy_helper

    values = numpy_helper.to_array(tensor)
    scales = (np.abs(values).max(axis=0).astype(np.float64) / largest).astype(np.float32)
    scales[scales < np.finfo(np.float32).tiny] = 1  # a channel of zeros
    integers = np.clip((values / scales).round(), -128, 127).astype(np.int8)
    arrays = integers, scales, np.zeros(len(scales), np.int8)
    return [numpy_helper.from_array(array, name) for array, name in zip(arrays, _parts(tensor.name), strict=True)]
