"""W8A8 with fixed scales, for backends that find int8 products in pairs of QuantizeLinear and DequantizeLinear.

A product becomes MatMul(DequantizeLinear(QuantizeLinear(x)), DequantizeLinear(codes [K, N])): one scale for the
activations of each product, from calibration text, and one for each output channel of the weights; all symmetric,
with zero points of 0, which TensorRT asks for. Products whose inputs the text did not show, the head and the embedding
stay in the target's floating type.
"""

from __future__ import annotations

import functools

import numpy as np
import onnx_ir as ir

from fmedge_converters.calibration.smooth_quant import smooth
from fmedge_converters.graph import DecoderGraph, replace
from fmedge_converters.passes.linear import Linear
from fmedge_converters.schemes.dynamic_int8 import QuantizedRows
from fmedge_converters.schemes.scheme import Scheme, SpellLinear
from fmedge_converters.weight import Weight, mapped, transposed

LEAST = 1e-6
"""The smallest scale: fp16 holds it, and none may be 0."""


def _spell_linear(
    graph: DecoderGraph, linear: Linear, *, is_head: bool, block_size: int, floating: SpellLinear
) -> None:
    """The product in int8 where the range of its input is known, else as `floating` has it."""
    largest = graph.input_ranges.get(linear.name)
    if is_head or largest is None:
        floating(graph, linear, is_head=is_head, block_size=block_size)
        return
    weight = graph.weights[linear.name]
    node, dtype = linear.node, linear.output.dtype
    if dtype is None:
        raise RuntimeError(f"the product with {linear.name} has no type")
    scale = graph.add_constant(f"{linear.name}.input.scale", np.array(max(largest / 127, LEAST), weight.dtype))
    zero = graph.add_constant("zero.int8", np.array(0, np.int8))
    (rounded,) = graph.insert(node, "QuantizeLinear", (linear.x, scale, zero), [(ir.DataType.INT8, linear.x.shape)])
    (x,) = graph.insert(node, "DequantizeLinear", (rounded, scale, zero), [(dtype, linear.x.shape)])
    matrix = _matrix(graph, linear, weight)
    like = [(dtype, linear.output.shape)]
    (product,) = graph.insert(node, "MatMul", (x, matrix), like)
    if linear.bias is not None:
        (product,) = graph.insert(node, "Add", (product, linear.bias), like)
    replace(linear.output, product)


def _matrix(graph: DecoderGraph, linear: Linear, weight: Weight) -> ir.Value:
    """The weight [K, N], from int8 codes."""
    rows = QuantizedRows(weight)
    codes = graph.add_weight(f"{linear.name}.int8.codes", transposed(rows.codes))
    scales = mapped(lambda found: np.maximum(found, LEAST).astype(weight.dtype), [rows.scales], weight.dtype)
    by_channel = graph.add_weight(f"{linear.name}.int8.scales", scales)
    shape = [weight.shape[1], weight.shape[0]]
    (matrix,) = graph.insert(
        linear.node, "DequantizeLinear", (codes, by_channel), [(linear.output.dtype, shape)], {"axis": 1}
    )
    return matrix


def static_int8(floating: Scheme) -> Scheme:
    """The scheme for a target whose `none` is `floating`."""
    return Scheme(
        "w8a8",
        "W8A8: int8 weights per channel, activations with fixed scales, smoothed (SmoothQuant); head in floating point",
        8,
        functools.partial(_spell_linear, floating=floating.linear),
        floating.embedding,
        block_size=0,
        calibrate=smooth,
        needs_calibration=True,
    )
