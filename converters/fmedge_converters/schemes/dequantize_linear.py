"""Weight-only rounding in ONNX's own operators, as TensorRT takes it: MatMul(x, DequantizeLinear(codes, scales)).

    int4   a block of `block_size` weights along K shares a scale        codes [K, N], scales [K / block, N]
    int8   the weights of an output channel share one                    codes [K, N], scales [N]

There is no zero point, and scales are positive. The plain scale of 4 bits is the smallest with which the largest and
the smallest weight of a block both have a code: max(w_max / 7, -w_min / 8). Smaller and larger ones are tried, too, and
the one with the least squared error is taken. All are rounded to the type that they are stored in before codes are
chosen. The token embedding stays floating: TensorRT dequantizes integers in front of products and convolutions only.
Operator: https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from fmedge_runtimes.errors import ExportError

from fmedge_converters.graph import DecoderGraph, replace
from fmedge_converters.passes.linear import Linear
from fmedge_converters.schemes.floating import spell_embedding
from fmedge_converters.schemes.scheme import Scheme
from fmedge_converters.weight import Array, Weight, reshaped, transposed

BLOCK_SIZE = 128
BLOCK_SIZES = (256, 128, 64, 32, 16)
"""That TensorRT takes; where K is no multiple of the one asked for, the next smaller one is tried."""
LEVELS = {4: (7.0, 5.5, 6.0, 6.5, 7.5, 8.0, 8.5), 8: (127.0,)}
"""The code that the largest weight of a block is given, before it is cut off; the first is plain rounding."""
CODES = {4: ir.DataType.INT4, 8: ir.DataType.INT8}


def quantize_symmetric(
    rows: Array, bits: int, block_size: int, dtype: np.dtype[np.generic], importance: Array | None = None
) -> tuple[Array, Array]:
    """Quantize rows [n, K] to codes int8 [n, K] and positive scales [n, K / block_size] in a floating type.

    `importance` [K] weights the squared error of each column; None: all alike.
    """
    count, size = rows.shape
    highest = (1 << (bits - 1)) - 1
    values = torch.from_numpy(rows).to(torch.float32).view(count, size // block_size, block_size)
    weights = torch.ones(size) if importance is None else torch.from_numpy(importance).to(torch.float32)
    weights = weights.view(1, size // block_size, block_size)
    best = None
    for level in LEVELS[bits]:
        peaks = torch.maximum(values.amax(-1) / level, values.amin(-1) / -(level + 1))  # [n, blocks]
        scales = _stored(torch.where(peaks > 0, peaks, 1.0), dtype)
        codes = (values / scales.unsqueeze(-1)).round_().clamp_(-highest - 1, highest)
        error = ((codes * scales.unsqueeze(-1) - values).square_() * weights).sum(-1)  # [n, blocks]
        if best is None:
            best = error, scales, codes
            continue
        better = error < best[0]
        best = (
            torch.where(better, error, best[0]),
            torch.where(better, scales, best[1]),
            torch.where(better.unsqueeze(-1), codes, best[2]),
        )
    if best is None:
        raise RuntimeError("no levels")
    return best[2].to(torch.int8).view(count, size).numpy(), best[1].numpy().astype(dtype)


def _stored(scales: torch.Tensor, dtype: np.dtype[np.generic]) -> torch.Tensor:
    """Scales as a type holds them, none of them zero."""
    smallest = np.float32(np.finfo(dtype.name).smallest_subnormal)
    rounded = np.maximum(scales.numpy(), smallest).astype(dtype)
    return torch.from_numpy(rounded.astype(np.float32))


@dataclass(frozen=True, slots=True)
class _Matrix:
    """The codes and scales of a weight [N, K], computed when they are read."""

    weight: Weight
    bits: int
    block_size: int

    def codes(self) -> Weight:
        """Codes [K, N] in int8, or two 4-bit ones in a byte [K, N / 2]."""
        rows = Weight(self.weight.shape, np.dtype(np.int8), self._codes, step=self.weight.rows_at_once)
        columns = transposed(rows)
        if self.bits == 8:
            return columns
        size, outputs = columns.shape
        return Weight(
            (size, outputs // 2),
            np.dtype(np.uint8),
            lambda start, stop: _packed(columns.read(start, stop)),
            step=columns.step,
        )

    def scales(self) -> Weight:
        """Scales [K / block, N]."""
        shape = (self.weight.shape[0], self.weight.shape[1] // self.block_size)
        return transposed(Weight(shape, self.weight.dtype, self._scales, step=self.weight.rows_at_once))

    def channel_scales(self) -> Weight:
        """Scales [N] of whole channels."""
        return reshaped(self.scales(), (self.weight.shape[0],))

    def _codes(self, start: int, stop: int) -> Array:
        return self._quantized(start, stop)[0]

    def _scales(self, start: int, stop: int) -> Array:
        return self._quantized(start, stop)[1]

    def _quantized(self, start: int, stop: int) -> tuple[Array, Array]:
        rows = self.weight.read(start, stop)
        importance = self.weight.importance
        known = importance if importance is not None and importance.shape == rows.shape[1:] else None
        return quantize_symmetric(rows, self.bits, self.block_size, self.weight.dtype, known)


def _packed(codes: Array) -> Array:
    """Codes [n, N] of 4 bits as bytes [n, N / 2], the even one in the low half."""
    nibbles = codes.view(np.uint8) & np.uint8(15)
    packed: Array = nibbles[:, 0::2] | (nibbles[:, 1::2] << np.uint8(4))
    return packed


def spell_linear(graph: DecoderGraph, linear: Linear, *, is_head: bool, block_size: int, bits: int) -> None:
    """The product with dequantized weights; what 4 bits cannot express has 8, as a decoder's head."""
    weight = graph.weights[linear.name]
    outputs, size = weight.shape
    if weight.rounding is not None:
        if not weight.rounding.symmetric or weight.rounding.bits not in CODES:
            zeros = "" if weight.rounding.symmetric else " and zero points"
            raise ExportError(
                f"{linear.name} is to have {weight.rounding.bits} bits{zeros}; TensorRT takes 4 or 8 without any."
            )
        bits, block_size = weight.rounding.bits, weight.rounding.block_size
    # Bytes of two codes must not run over the end of a row.
    block = next((item for item in BLOCK_SIZES if item <= block_size and size % item == 0), None)
    if is_head or bits == 8 or block is None or outputs % 2:
        bits, block = 8, size
    matrix, name = _Matrix(weight, bits, block), f"{linear.name}.symmetric{bits}"
    codes = graph.add_weight(f"{name}.codes", matrix.codes(), stored=(CODES[bits], (size, outputs)))
    if block == size:
        scales = graph.add_weight(f"{name}.scales", matrix.channel_scales())
        attributes = {"axis": 1}
    else:
        scales = graph.add_weight(f"{name}.scales", matrix.scales())
        attributes = {"axis": 0, "block_size": block}
    matrix_like = [(linear.output.dtype, (size, outputs))]
    (wide,) = graph.insert(linear.node, "DequantizeLinear", (codes, scales), matrix_like, attributes)
    like = [(linear.output.dtype, linear.output.shape)]
    (product,) = graph.insert(linear.node, "MatMul", (linear.x, wide), like)
    if linear.bias is not None:
        (product,) = graph.insert(linear.node, "Add", (product, linear.bias), like)
    replace(linear.output, product)


def dequantize_linear(name: str, summary: str, bits: int) -> Scheme:
    """A weight-only scheme for TensorRT."""
    return Scheme(
        name,
        summary,
        bits,
        functools.partial(spell_linear, bits=bits),
        spell_embedding,
        block_size=BLOCK_SIZE if bits == 4 else 0,
    )
