from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipelines.whisper.export import onnx_int8

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture
def plain(tmp_path) -> Path:
    """A graph with two products of one input, one of another, a channel of zeros, and a product without weights."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal((8, 8)).astype(np.float32) for name in ("first", "second", "third")}
    weights["second"][:, 3] = 0
    weights["third"] *= np.float32(100)
    products = [("x", "first", "a"), ("x", "second", "b"), ("a", "third", "c"), ("b", "c", "y")]
    nodes = [helper.make_node("MatMul", [left, right], [output], output) for left, right, output in products]
    sides = ([helper.make_tensor_value_info(name, TensorProto.FLOAT, [8, 8])] for name in ("x", "y"))
    initial = [numpy_helper.from_array(values, name) for name, values in weights.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "products", *sides, initial), opset_imports=[helper.make_opsetid("", 17)]
    )
    model.ir_version = 8
    onnx.save(model, tmp_path / "plain.onnx")
    return tmp_path / "plain.onnx"


def run(path: Path, values: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": values})[0]


@pytest.mark.parametrize("seven_bits", [False, True])
def test_products_equal_those_of_onnx_runtime_to_the_bit(plain, tmp_path, seven_bits):
    from onnxruntime.quantization import QuantType, quantize_dynamic

    options = {"op_types_to_quantize": ["MatMul"], "per_channel": True, "extra_options": {"MatMulConstBOnly": True}}
    ours, theirs = tmp_path / "ours.onnx", tmp_path / "theirs.onnx"
    onnx_int8.quantise(plain, ours, seven_bits=seven_bits)
    quantize_dynamic(plain, theirs, weight_type=QuantType.QInt8, reduce_range=seven_bits, **options)
    values = np.random.default_rng(1).standard_normal((8, 8)).astype(np.float32)
    assert np.array_equal(run(ours, values), run(theirs, values))
    assert not np.array_equal(run(ours, values), run(plain, values))


def test_input_of_two_products_is_quantised_once(plain, tmp_path):
    onnx_int8.quantise(plain, tmp_path / "ours.onnx", seven_bits=False)
    types = [node.op_type for node in onnx.load(tmp_path / "ours.onnx").graph.node]
    assert [types.count(name) for name in ("DynamicQuantizeLinear", "MatMulInteger", "MatMul")] == [2, 3, 1]
