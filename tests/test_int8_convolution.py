"""Convolutions in int8: near the fp32 result, each image by itself, and what stays as it is."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from fmedge_converters.graph import DecoderGraph
from fmedge_converters.kept_precise import is_kept
from fmedge_converters.passes.convolution import convolutions
from fmedge_converters.schemes.int8_convolution import spell_convolution
from fmedge_converters.weight import weight_from_array

CHANNELS, FILTERS = 24, 40


def graph_of(*, silu: bool, bias: bool, group: int = 1, **attributes: object) -> DecoderGraph:
    """x -> [SiLU] -> Conv -> y."""
    random = np.random.default_rng(0)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", CHANNELS, "h", "w"]))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 20}, name="test")
    made = DecoderGraph(ir.Model(graph, ir_version=10), {})
    shape = (FILTERS, CHANNELS // group, 3, 3)
    inputs = [x, made.add_weight("weight", weight_from_array(random.standard_normal(shape).astype(np.float32)))]
    if silu:
        gate = ir.node("Sigmoid", [x])
        product = ir.node("Mul", [x, gate.outputs[0]])
        product.outputs[0].dtype, product.outputs[0].shape = x.dtype, x.shape
        graph.extend([gate, product])
        inputs[0] = product.outputs[0]
    if bias:
        inputs.append(made.add_weight("bias", weight_from_array(random.standard_normal(FILTERS).astype(np.float32))))
    conv = ir.node("Conv", inputs, {"group": group, **attributes})
    conv.outputs[0].name = "y"
    conv.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    conv.outputs[0].shape = ir.Shape(["batch", FILTERS, "h2", "w2"])
    graph.append(conv)
    graph.outputs.append(conv.outputs[0])
    return made


def run(graph: DecoderGraph, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(ir.serde.serialize_model(graph.model).SerializeToString())
    found: np.ndarray = session.run(None, {"x": x})[0]
    return found


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(
    ("bias", "attributes"),
    [(True, {"pads": [1, 1, 1, 1]}), (False, {"pads": [0, 0, 1, 1], "strides": [2, 2]}), (True, {"dilations": [2, 2]})],
)
def test_near_fp32(silu: bool, bias: bool, attributes: dict[str, list[int]]) -> None:
    graph = graph_of(silu=silu, bias=bias, **attributes)
    x = np.random.default_rng(1).standard_normal((2, CHANNELS, 9, 11)).astype(np.float32)
    wanted = run(graph, x)
    (found,) = convolutions(graph)
    spell_convolution(graph, found)
    graph.remove_unused()
    assert [node.op_type for node in graph.graph].count("ConvInteger") == 1
    assert "weight" not in graph.graph.initializers
    given = run(graph, x)
    assert given.shape == wanted.shape
    assert np.sqrt(np.mean((given - wanted) ** 2)) < 0.015 * wanted.std()
    # The padding is of zeros, also where the code of zero is not 0.
    assert np.abs(given - wanted).max() < 0.08 * wanted.std()


def test_an_image_does_not_depend_on_its_neighbours() -> None:
    graph = graph_of(silu=True, bias=True, pads=[1, 1, 1, 1])
    spell_convolution(graph, *convolutions(graph))
    graph.remove_unused()
    x = np.random.default_rng(1).standard_normal((3, CHANNELS, 8, 8)).astype(np.float32)
    x[1] *= 50
    x[2] = 0
    together = run(graph, x)
    np.testing.assert_array_equal(together, np.concatenate([run(graph, x[row : row + 1]) for row in range(3)]))
    assert np.isfinite(together).all()


def test_groups_stay() -> None:
    assert convolutions(graph_of(silu=False, bias=True, group=4)) == []


@pytest.mark.parametrize(
    "name", ["conv_in.weight", "conv_out.weight", "vision_model.embeddings.patch_embedding.weight"]
)
def test_the_first_and_the_last_stay(name: str) -> None:
    assert is_kept(name)
    assert not is_kept("down_blocks.0.resnets.0.conv1.weight")
