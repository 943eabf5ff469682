"""W8A8 convolutions on the CPU: weights with a scale for each output channel, activations quantized in every call.

    codes = QuantizeLinear(x)                          int8, one scale for each image of a batch
    y     = ConvInteger(codes, weights) * scales + bias

Which side is signed decides everything. ConvInteger multiplies the kernel from the left; ONNX Runtime's fast product
(VNNI) takes unsigned numbers there and signed ones on the right. A 3 x 3 convolution of 320 channels over 64 x 64 takes
24 ms of processor time so (one core of an AMD EPYC with AVX512-VNNI), 67 ms in fp32, and 250 ms with unsigned
activations, as DynamicQuantizeLinear makes them, and signed weights. Weights are thus stored with a zero point of 128.

Each image has a scale of its own, so that images of a batch do not influence each other. The zero point is the same for
all, as ConvInteger takes one: behind a SiLU, which does not fall below -0.28, it gives three quarters of the codes to
positive numbers.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from fmedge_converters.graph import DecoderGraph, produced_by, replace
from fmedge_converters.passes.convolution import Convolution
from fmedge_converters.schemes.dynamic_int8 import QuantizedRows
from fmedge_converters.weight import Array, Weight, mapped, reshaped

MIDDLE, BEHIND_SILU = 0, -64
"""Codes of zero."""
LOWEST, HIGHEST = -128, 127
SMALLEST = 1e-20
"""Of a scale, for images that are zero everywhere."""
KEPT_ATTRIBUTES = ("auto_pad", "dilations", "kernel_shape", "pads", "strides")


def spell_convolution(graph: DecoderGraph, convolution: Convolution) -> None:
    """Replace a Conv by ConvInteger between a quantization and a scaling."""
    node, output, name = convolution.node, convolution.output, convolution.name
    weight = graph.weights[name]
    channels = weight.shape[0]
    codes, scales = _weights(graph, name, weight)
    zero = BEHIND_SILU if _is_silu(convolution.x) else MIDDLE
    x, scale = _quantized(graph, convolution, zero)
    attributes = {key: value for key, value in node.attributes.items() if key in KEPT_ATTRIBUTES}
    inputs = (x, codes, _number(graph, zero, np.int8), _number(graph, 128, np.uint8))
    (products,) = graph.insert(node, "ConvInteger", inputs, [(ir.DataType.INT32, output.shape)])
    products_node = products.producer()
    assert products_node is not None
    products_node.attributes.update(attributes)
    like = (output.dtype, output.shape)
    (result,) = graph.insert(node, "Cast", (products,), [like], {"to": int(ir.DataType.FLOAT)})
    (both,) = graph.insert(node, "Mul", (scale, scales), [(output.dtype, None)])  # [B, O, 1, 1]
    (result,) = graph.insert(node, "Mul", (result, both), [like])
    if convolution.bias is not None:
        bias_name = str(convolution.bias.name)
        bias = graph.add_weight(f"{bias_name}.O11", reshaped(graph.weights[bias_name], (channels, 1, 1)))
        (result,) = graph.insert(node, "Add", (result, bias), [like])
    replace(output, result)


def _weights(graph: DecoderGraph, name: str, weight: Weight) -> tuple[ir.Value, ir.Value]:
    """Initializers for codes uint8 [O, C, h, w] around 128, and scales [O, 1, 1]."""
    rows = QuantizedRows(reshaped(weight, (weight.shape[0], int(np.prod(weight.shape[1:])))))
    codes = reshaped(mapped(_unsigned, [rows.codes], np.dtype(np.uint8)), weight.shape)
    scales = reshaped(rows.scales, (weight.shape[0], 1, 1))
    return graph.add_weight(f"{name}.uint8.codes", codes), graph.add_weight(f"{name}.uint8.scales", scales)


def _unsigned(codes: Array) -> Array:
    return (codes.view(np.uint8) ^ np.uint8(128)).astype(np.uint8, copy=False)


def _quantized(graph: DecoderGraph, convolution: Convolution, zero: int) -> tuple[ir.Value, ir.Value]:
    """The input's codes int8 [B, C, H, W] and their scales [B, 1, 1, 1]."""
    before, x = convolution.node, convolution.x
    kind = ir.DataType.FLOAT
    batch = None if x.shape is None else ir.Shape([x.shape[0]])
    one = (kind, batch)
    axes = graph.add_constant("axes.1-3", np.array([1, 2, 3], np.int64))
    (highest,) = graph.insert(before, "ReduceMax", (x, axes), [one], {"keepdims": 0})
    (lowest,) = graph.insert(before, "ReduceMin", (x, axes), [one], {"keepdims": 0})
    (up,) = graph.insert(before, "Mul", (highest, _number(graph, 1 / (HIGHEST - zero), np.float32)), [one])
    (down,) = graph.insert(before, "Mul", (lowest, _number(graph, 1 / (LOWEST - zero), np.float32)), [one])
    (scale,) = graph.insert(before, "Max", (up, down, _number(graph, SMALLEST, np.float32)), [one])
    (rows,) = graph.insert(before, "Shape", (scale,), [(ir.DataType.INT64, [1])])
    (zeros,) = graph.insert(before, "Expand", (_number(graph, zero, np.int8), rows), [(ir.DataType.INT8, batch)])
    like = [(ir.DataType.INT8, x.shape)]
    (codes,) = graph.insert(before, "QuantizeLinear", (x, scale, zeros), like, {"axis": 0})
    shape = graph.add_constant("shape.-1x1x1x1", np.array([-1, 1, 1, 1], np.int64))
    (column,) = graph.insert(before, "Reshape", (scale, shape), [(kind, None)])
    return codes, column


def _number(graph: DecoderGraph, value: float, kind: type[np.generic]) -> ir.Value:
    return graph.add_constant(f"number.{np.dtype(kind).name}.{value!r}", np.array(value, kind))


def _is_silu(value: ir.Value) -> bool:
    """Whether a value is x * sigmoid(x)."""
    product = produced_by(value, "Mul")
    if product is None:
        return False
    first, second = product.inputs
    gates = (produced_by(first, "Sigmoid"), produced_by(second, "Sigmoid"))
    return any(gate is not None and gate.inputs[0] is other for gate, other in zip(gates, (second, first), strict=True))
