"""Products of two quantized factors with fixed scales, for backends that find them in pairs of QuantizeLinear and
DequantizeLinear.

A product becomes MatMul(DequantizeLinear(QuantizeLinear(x)), DequantizeLinear(codes [K, N])): one scale for the
activations of each product, from what calibration showed, and one for each output channel of the weights, or for the
whole weight; all symmetric, with zero points of 0, which TensorRT asks for.

    w8a8   int8                      code of the largest: 127
    fp8    E4M3, a float of 8 bits   code of the largest: 448, of activations 224

Products whose inputs calibration did not show, the head and the embedding stay in the target's floating type.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from fmedge_converters.calibration.input_ranges import note_input_ranges
from fmedge_converters.calibration.smooth_quant import smooth
from fmedge_converters.graph import DecoderGraph, replace
from fmedge_converters.passes.linear import Linear
from fmedge_converters.schemes.dynamic_int8 import QuantizedRows
from fmedge_converters.schemes.float8 import E4M3, by_channel, by_tensor
from fmedge_converters.schemes.scheme import Scheme, SpellLinear
from fmedge_converters.weight import Weight, mapped, transposed

LEAST = 2.0**-24
"""The smallest scale that fp16 holds; none may be 0."""


@dataclass(frozen=True, slots=True)
class Codes:
    """A type of codes, and how numbers get them."""

    name: str
    dtype: np.dtype[np.generic]
    largest: float
    """The code of the largest activation."""
    quantize: Callable[[Weight], tuple[Weight, Weight]]
    """A weight [N, K] to codes [N, K] and scales, [N] or []."""


def _int8_rows(weight: Weight) -> tuple[Weight, Weight]:
    rows = QuantizedRows(weight)
    return rows.codes, rows.scales


INT8 = Codes("int8", np.dtype(np.int8), 127.0, _int8_rows)
FLOAT8 = Codes("fp8", E4M3, 224.0, by_channel)
"""Activations keep a binade of headroom, which costs a float nothing: cutting off costs much (docs/quantization.md)."""
FLOAT8_BY_TENSOR = dataclasses.replace(FLOAT8, quantize=by_tensor)


def _spell_linear(
    graph: DecoderGraph, linear: Linear, *, is_head: bool, block_size: int, floating: SpellLinear, codes: Codes
) -> None:
    """The product in codes where the range of its input is known, else as `floating` has it."""
    largest = graph.input_ranges.get(linear.name)
    if is_head or largest is None:
        floating(graph, linear, is_head=is_head, block_size=block_size)
        return
    weight, node = graph.weights[linear.name], linear.node
    x = _rounded(graph, linear, largest, weight.dtype, codes)
    rows, by_row = codes.quantize(weight)
    columns = graph.add_weight(f"{linear.name}.{codes.name}.codes", transposed(rows))
    held = mapped(lambda found: np.maximum(found, LEAST).astype(weight.dtype), [by_row], weight.dtype)
    scales = graph.add_weight(f"{linear.name}.{codes.name}.scales", held)
    wide = [(linear.output.dtype, weight.shape[::-1])]
    (matrix,) = graph.insert(node, "DequantizeLinear", (columns, scales), wide, {"axis": 1} if by_row.shape else {})
    like = [(linear.output.dtype, linear.output.shape)]
    (product,) = graph.insert(node, "MatMul", (x, matrix), like)
    if linear.bias is not None:
        (product,) = graph.insert(node, "Add", (product, linear.bias), like)
    replace(linear.output, product)


def _rounded(
    graph: DecoderGraph, linear: Linear, largest: float, dtype: np.dtype[np.generic], codes: Codes
) -> ir.Value:
    """Activations as their codes have them."""
    scale = graph.add_constant(f"{linear.name}.input.scale", np.array(max(largest / codes.largest, LEAST), dtype))
    zero = graph.add_constant(f"zero.{codes.name}", np.zeros((), codes.dtype))
    x, before = linear.x, linear.node
    like = [(ir.DataType.from_numpy(codes.dtype), x.shape)]
    (rounded,) = graph.insert(before, "QuantizeLinear", (x, scale, zero), like)
    (values,) = graph.insert(before, "DequantizeLinear", (rounded, scale, zero), [(x.dtype, x.shape)])
    return values


def static_int8(floating: Scheme) -> Scheme:
    """The scheme for a target whose `none` is `floating`."""
    return Scheme(
        "w8a8",
        "W8A8: int8 weights per channel, activations with fixed scales, smoothed (SmoothQuant); head in floating point",
        8,
        functools.partial(_spell_linear, floating=floating.linear, codes=INT8),
        floating.embedding,
        block_size=0,
        calibrate=smooth,
        needs_calibration=True,
    )


def static_float8(floating: Scheme, codes: Codes = FLOAT8) -> Scheme:
    """The scheme for a target whose `none` is `floating`."""
    return Scheme(
        "fp8",
        "fp8 (E4M3): weights, and activations with fixed scales; head in floating point",
        8,
        functools.partial(_spell_linear, floating=floating.linear, codes=codes),
        floating.embedding,
        block_size=0,
        calibrate=note_input_ranges,
        needs_calibration=True,
    )
