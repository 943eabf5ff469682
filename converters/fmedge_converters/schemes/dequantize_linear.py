"""Weight-only rounding in ONNX's own operators, as TensorRT takes it: MatMul(x, DequantizeLinear(codes, scales)).

    int4   a block of `block_size` weights along K shares a scale        codes [K, N], scales [K / block, N]
    int8   the weights of an output channel share one                    codes [K, N], scales [N]

There is no zero point, and scales are positive (`Rounding.positive`). Codes that a source has in this form, or that
were fitted to calibration text, are written as they are. The token embedding stays floating: TensorRT dequantizes
integers in front of products and convolutions only.
Operator: https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from fmedge_runtimes.errors import ExportError

from fmedge_converters.calibration.weighted import weigh_errors
from fmedge_converters.formats.grouped import unpacked
from fmedge_converters.graph import DecoderGraph
from fmedge_converters.graph import replace as replace_value
from fmedge_converters.passes.linear import Linear
from fmedge_converters.rounding import Rounding
from fmedge_converters.schemes.floating import spell_embedding
from fmedge_converters.schemes.kept_codes import sorted_columns
from fmedge_converters.schemes.scheme import Scheme
from fmedge_converters.schemes.weight_only import QuantizedMatrix
from fmedge_converters.weight import Array, PackedMatrix, Weight, reshaped, transposed

BLOCK_SIZE = 128
BLOCK_SIZES = (256, 128, 64, 32, 16)
"""That TensorRT takes; where K is no multiple of the one asked for, the next smaller one is tried."""
CODES = {4: ir.DataType.INT4, 8: ir.DataType.INT8}
CHOICES = (*(Rounding(4, block, positive=True) for block in BLOCK_SIZES), Rounding(8, 0, positive=True))
"""What a matrix may become with a budget of bits."""
CHECKED_ROWS = 1024
"""Whose scales are looked at together."""


def kept_codes(weight: Weight, bits: tuple[int, ...]) -> PackedMatrix | None:
    """The codes of a source that can be written as they are; None if there are none of these widths. Reads its scales.

    4 bits need blocks that divide K, and an even number of rows; 8 bits need one scale for each row.
    """
    packed = weight.packed
    if packed is None or packed.bits not in bits or packed.zero_points is not None:
        return None
    outputs, size = weight.shape[-2:]
    whole_rows = packed.bits == 8
    if not whole_rows and (packed.block_size not in BLOCK_SIZES or size % packed.block_size or outputs % 2):
        return None
    rows = math.prod(weight.shape[:-1])
    for start in range(0, rows, CHECKED_ROWS):
        scales = packed.scales(start, min(start + CHECKED_ROWS, rows))  # [n, blocks]
        if not (scales > 0).all() or (whole_rows and (scales != scales[:, :1]).any()):
            return None
    return _of_rows(packed, size) if whole_rows else packed


def _of_rows(packed: PackedMatrix, size: int) -> PackedMatrix:
    """Bytes in blocks that share the scale of their row, as one block."""

    def codes(start: int, stop: int) -> Array:
        found = packed.codes(start, stop)  # [n, blocks, block_size]
        return np.ascontiguousarray(found.reshape(len(found), -1)[:, None, :size])

    def scales(start: int, stop: int) -> Array:
        return np.ascontiguousarray(packed.scales(start, stop)[:, :1])

    return replace(packed, block_size=size, codes=codes, scales=scales)


@dataclass(frozen=True, slots=True)
class _Matrix:
    """A matrix [N, K] in whole blocks, as MatMulNBits has it."""

    bits: int
    block_size: int
    codes: Weight
    """uint8 [N, blocks, block_size * bits / 8]."""
    scales: Weight
    """[N, blocks]."""

    @property
    def shape(self) -> tuple[int, int]:
        """[K, N], as it is written."""
        rows, blocks = self.scales.shape
        return blocks * self.block_size, rows

    def written_codes(self) -> Weight:
        """Signed codes [K, N] in int8, or two 4-bit ones in a byte [K, N / 2]."""
        size, outputs = self.shape
        rows = Weight((outputs, size), np.dtype(np.int8), self._signed, step=self.codes.rows_at_once)
        columns = transposed(rows)
        if self.bits == 8:
            return columns
        return Weight(
            (size, outputs // 2),
            np.dtype(np.uint8),
            lambda start, stop: _packed(columns.read(start, stop)),
            step=columns.step,
        )

    def written_scales(self) -> Weight:
        """Scales [K / block, N], or [N] of whole channels."""
        rows, blocks = self.scales.shape
        return reshaped(self.scales, (rows,)) if blocks == 1 else transposed(self.scales)

    def _signed(self, start: int, stop: int) -> Array:
        codes = self.codes.read(start, stop)
        flat = unpacked(codes.reshape(len(codes), -1), self.bits)  # uint8 [n, K]
        signed: Array = (flat - np.uint8(1 << (self.bits - 1))).view(np.int8)
        return signed


def _packed(codes: Array) -> Array:
    """Codes [n, N] of 4 bits as bytes [n, N / 2], the even one in the low half."""
    nibbles = codes.view(np.uint8) & np.uint8(15)
    packed: Array = nibbles[:, 0::2] | (nibbles[:, 1::2] << np.uint8(4))
    return packed


def _rounded(weight: Weight, rounding: Rounding) -> _Matrix:
    whole = replace(rounding, block_size=rounding.block_size or weight.shape[1])
    made = QuantizedMatrix(weight, whole, weight.dtype)
    return _Matrix(whole.bits, whole.block_size, made.codes, made.scales)


def _as_it_is(weight: Weight, packed: PackedMatrix) -> _Matrix:
    def scales(start: int, stop: int) -> Array:
        return packed.scales(start, stop).astype(weight.dtype)

    rows, size = weight.shape
    blocks, row_bytes = size // packed.block_size, packed.block_size * packed.bits // 8
    return _Matrix(
        packed.bits,
        packed.block_size,
        Weight((rows, blocks, row_bytes), np.dtype(np.uint8), packed.codes),
        Weight((rows, blocks), weight.dtype, scales),
    )


@dataclass(frozen=True, slots=True)
class _DequantizeLinear:
    """What the functions of a weight-only scheme share."""

    bits: int
    head_bits: int

    def keeps(self, weight: Weight) -> PackedMatrix | None:
        """A scheme of 4 bits keeps what a source has in 8, too."""
        return kept_codes(weight, (4, 8) if self.bits == 4 else (8,))

    def rounding(self, weight: Weight, *, is_head: bool, block_size: int) -> Rounding:
        """The weight's own, or the scheme's, as far as a graph can have it: what 4 bits cannot express has 8."""
        asked = weight.rounding or Rounding(self.head_bits if is_head else self.bits, block_size)
        outputs, size = weight.shape[-2:]
        block = next((item for item in BLOCK_SIZES if item <= asked.block_size and size % item == 0), None)
        # Bytes of two codes must not run over the end of a row.
        if asked.bits == 8 or block is None or outputs % 2:
            return Rounding(8, 0, search=asked.search, positive=True)
        return Rounding(4, block, search=asked.search, positive=True)

    def linear(self, graph: DecoderGraph, linear: Linear, *, is_head: bool, block_size: int) -> None:
        """Spell a Linear as the product with dequantized weights."""
        weight = graph.weights[linear.name]
        asked = weight.rounding
        if asked is not None and (not asked.symmetric or asked.bits not in CODES):
            zeros = "" if asked.symmetric else " and zero points"
            raise ExportError(f"{linear.name} is to have {asked.bits} bits{zeros}; TensorRT takes 4 or 8 without any.")
        packed = weight.packed
        if packed is not None:
            matrix = _as_it_is(weight, packed)
        else:
            matrix = _rounded(weight, self.rounding(weight, is_head=is_head, block_size=block_size))
        x = linear.x if packed is None or packed.columns is None else sorted_columns(graph, linear, packed.columns)
        name = f"{linear.name}.symmetric{matrix.bits}"
        codes = graph.add_weight(f"{name}.codes", matrix.written_codes(), stored=(CODES[matrix.bits], matrix.shape))
        scales = graph.add_weight(f"{name}.scales", matrix.written_scales())
        whole = len(graph.weights[f"{name}.scales"].shape) == 1
        attributes = {"axis": 1} if whole else {"axis": 0, "block_size": matrix.block_size}
        matrix_like = [(linear.output.dtype, matrix.shape)]
        (wide,) = graph.insert(linear.node, "DequantizeLinear", (codes, scales), matrix_like, attributes)
        like = [(linear.output.dtype, linear.output.shape)]
        (product,) = graph.insert(linear.node, "MatMul", (x, wide), like)
        if linear.bias is not None:
            (product,) = graph.insert(linear.node, "Add", (product, linear.bias), like)
        replace_value(linear.output, product)


def dequantize_linear(name: str, summary: str, bits: int, head_bits: int = 8) -> Scheme:
    """A weight-only scheme for TensorRT."""
    shared = _DequantizeLinear(bits, head_bits)
    return Scheme(
        name,
        summary,
        bits,
        shared.linear,
        spell_embedding,
        block_size=BLOCK_SIZE if bits == 4 else 0,
        keeps=shared.keeps,
        rounding=shared.rounding,
        lookup_bits=16,
        choices=CHOICES if bits == 4 else (),
        calibrate=weigh_errors,
    )
