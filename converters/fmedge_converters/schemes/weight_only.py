"""Weight-only rounding in blocks: MatMulNBits, and GatherBlockQuantized for the embedding.

How blocks are rounded is in rounding.py. The operators take 2 ** (bits - 1) as zero point when none is given. They want
scales in the type of the activations; for fp32 these lie in the file as bf16, to which the codes are fitted, and ONNX
Runtime casts them once, when it opens the graph. bf16 has the range of fp32, so no scale is too small for it.
Operators: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md (MatMulNBits,
GatherBlockQuantized).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch

from fmedge_converters.calibration.weighted import weigh_errors
from fmedge_converters.graph import MICROSOFT, DecoderGraph, replace
from fmedge_converters.passes.linear import Linear
from fmedge_converters.passes.lookup import Lookup
from fmedge_converters.rounding import RoundedBlocks, Rounding, joined, round_blocks
from fmedge_converters.scales import add_scales, scale_dtype
from fmedge_converters.schemes.kept_codes import kept_embedding_rows, spell_kept_linear
from fmedge_converters.schemes.matmul_nbits import Blocks, insert_matmul_nbits
from fmedge_converters.schemes.scheme import Scheme, SpellMixture
from fmedge_converters.weight import Array, PackedMatrix, Read, Weight, reshaped

BLOCK_SIZE = 32
"""The default, by measurement: docs/quantization.md."""


TORCH_TYPES = {
    np.dtype(np.float16): torch.float16,
    np.dtype(np.float32): torch.float32,
    np.dtype(ml_dtypes.bfloat16): torch.bfloat16,
}
"""Of scales."""


class QuantizedMatrix:
    """Codes, scales and zero points of a matrix [N, K], or of matrices [E, N, K], which are read by blocks of axis 0.

    The scales and zero points of what was read as codes are kept until they are read, so that nothing is quantized
    twice when all codes are read before them.
    """

    def __init__(self, weight: Weight, rounding: Rounding, scales: np.dtype[np.generic] | None = None) -> None:
        self._weight = weight
        self._scale_dtype = scale_dtype(weight.dtype) if scales is None else scales
        self._rounding = rounding
        self._scales_kept: dict[tuple[int, int], Array] = {}
        self._zeros_kept: dict[tuple[int, int], Array] = {}
        self._blocks = -(-weight.shape[-1] // rounding.block_size)

    @property
    def codes(self) -> Weight:
        """Packed bytes [..., N, blocks, block_size * bits / 8]."""
        row = self._rounding.block_size * self._rounding.bits // 8
        return self._part((self._blocks, row), np.dtype(np.uint8), self._codes)

    @property
    def scales(self) -> Weight:
        """Scales [..., N, blocks]."""
        return self._part((self._blocks,), self._scale_dtype, self._scales)

    @property
    def zero_points(self) -> Weight | None:
        """Packed bytes [..., N, ceil(blocks * bits / 8)]; None when rounding is symmetric."""
        if self._rounding.symmetric:
            return None
        return self._part((-(-self._blocks * self._rounding.bits // 8),), np.dtype(np.uint8), self._zeros)

    def _part(self, row: tuple[int, ...], dtype: np.dtype[np.generic], read: Read) -> Weight:
        return Weight((*self._weight.shape[:-1], *row), dtype, read, step=self._weight.rows_at_once)

    def _codes(self, start: int, stop: int) -> Array:
        rows = self._weight.read(start, stop)
        made = self._rounded(rows, start)
        lead = rows.shape[:-1]
        self._scales_kept[start, stop] = made.scales.numpy().astype(self._scale_dtype).reshape(*lead, -1)
        zeros = made.packed_zero_points()
        if zeros is not None:
            self._zeros_kept[start, stop] = zeros.numpy().reshape(*lead, -1)
        codes = made.packed_codes().numpy()
        return codes.reshape(*lead, *codes.shape[1:])

    def _rounded(self, rows: Array, start: int) -> RoundedBlocks:
        """Rows [n, K], or matrices [n, N, K], of which each may have its own importance."""
        importance = self._weight.importance
        size = rows.shape[-1]
        dtype = TORCH_TYPES[self._scale_dtype]
        if importance is None or importance.shape[-1] != size:
            return round_blocks(torch.from_numpy(rows.reshape(-1, size)), self._rounding, None, dtype)
        if importance.ndim == 1:
            weights = torch.from_numpy(importance)
            return round_blocks(torch.from_numpy(rows.reshape(-1, size)), self._rounding, weights, dtype)
        return joined(
            [
                round_blocks(
                    torch.from_numpy(matrix), self._rounding, torch.from_numpy(importance[start + index]), dtype
                )
                for index, matrix in enumerate(rows)
            ]
        )

    def _scales(self, start: int, stop: int) -> Array:
        if (start, stop) not in self._scales_kept:
            self._codes(start, stop)
        return self._scales_kept.pop((start, stop))

    def _zeros(self, start: int, stop: int) -> Array:
        if (start, stop) not in self._zeros_kept:
            self._codes(start, stop)
        return self._zeros_kept.pop((start, stop))


def joined_blocks(codes: Weight) -> Weight:
    """Codes [..., N, blocks, bytes] as [..., N, blocks * bytes]; the bytes are the same."""
    return reshaped(codes, (*codes.shape[:-2], codes.shape[-2] * codes.shape[-1]))


@dataclass(frozen=True, slots=True)
class _Quantized:
    """Initializers of a matrix."""

    codes: ir.Value  # [N, blocks, block_size * bits / 8]
    scales: ir.Value  # [N, blocks]
    zero_points: ir.Value | None  # [N, ceil(blocks * bits / 8)]


def _add_quantized(graph: DecoderGraph, name: str, weight: Weight, rounding: Rounding) -> _Quantized:
    stem = f"{name}.int{rounding.bits}"
    matrix = QuantizedMatrix(weight, rounding)
    zeros = matrix.zero_points
    return _Quantized(
        graph.add_weight(f"{stem}.codes", matrix.codes),
        add_scales(graph, f"{stem}.scales", matrix.scales, weight.dtype),
        None if zeros is None else graph.add_weight(f"{stem}.zero_points", zeros),
    )


@dataclass(frozen=True, slots=True)
class _WeightOnly:
    """What the functions of a weight-only scheme share."""

    bits: int
    head_bits: int
    symmetric: bool
    search: bool
    accuracy_level: int

    def rounding(self, weight: Weight, *, is_head: bool, block_size: int) -> Rounding:
        """The weight's own, or the scheme's."""
        bits = self.head_bits if is_head else self.bits
        return weight.rounding or Rounding(bits, block_size, self.symmetric, self.search)

    def linear(self, graph: DecoderGraph, linear: Linear, *, is_head: bool, block_size: int) -> None:
        """Spell a Linear as MatMulNBits."""
        weight = graph.weights[linear.name]
        if weight.packed is not None:
            spell_kept_linear(graph, linear, weight.packed, self.accuracy_level)
            return
        rounding = self.rounding(weight, is_head=is_head, block_size=block_size)
        made = _add_quantized(graph, linear.name, weight, rounding)
        insert_matmul_nbits(
            graph,
            linear,
            (linear.x, made.codes, made.scales, made.zero_points),
            Blocks(weight.shape, rounding.bits, rounding.block_size),
            self.accuracy_level,
        )

    def embedding(self, graph: DecoderGraph, embedding: Lookup, *, tied: bool, block_size: int) -> None:
        """The head's codes when both are tied, without their axis of blocks: the writer stores equal bytes once."""
        del tied  # codes have names: those that the head has made are found
        weight = graph.weights[str(embedding.weight.name)]
        size = weight.shape[1]
        packed = weight.packed if weight.packed is not None and weight.packed.columns is None else None
        if packed is not None:
            block_size = packed.block_size
            rows = kept_embedding_rows(graph, embedding, packed)
        else:
            rounding = self.rounding(weight, is_head=True, block_size=block_size)
            block_size = rounding.block_size
            rows = _embedding_rows(graph, embedding, weight, rounding)
        padded = -(-size // block_size) * block_size
        if padded != size:
            numbers = [graph.add_constant(f"slice.{number}", np.array([number], np.int64)) for number in (0, size, 2)]
            (rows,) = graph.insert(
                embedding.node, "Slice", (rows, *numbers), [(embedding.output.dtype, embedding.output.shape)]
            )
        replace(embedding.output, rows)


def _embedding_rows(graph: DecoderGraph, embedding: Lookup, weight: Weight, rounding: Rounding) -> ir.Value:
    """Rows [B, S, E], E padded to whole blocks."""
    name = str(embedding.weight.name)
    made = _add_quantized(graph, name, weight, rounding)
    flat = joined_blocks(graph.weights[str(made.codes.name)])
    codes = graph.add_weight(f"{name}.int{rounding.bits}.rows", flat)
    inputs = [codes, embedding.ids, made.scales]
    if made.zero_points is not None:
        inputs.append(made.zero_points)
    padded = -(-weight.shape[1] // rounding.block_size) * rounding.block_size
    (rows,) = graph.insert(
        embedding.node,
        "GatherBlockQuantized",
        inputs,
        [(embedding.output.dtype, [*list(embedding.output.shape or ())[:-1], padded])],
        {"bits": rounding.bits, "block_size": rounding.block_size, "gather_axis": 0, "quantize_axis": 1},
        MICROSOFT,
    )
    return rows


def _kept(bits: tuple[int, ...], weight: Weight) -> PackedMatrix | None:
    return weight.packed if weight.packed is not None and weight.packed.bits in bits else None


def weight_only(
    name: str,
    summary: str,
    bits: int,
    *,
    head_bits: int,
    accuracy_level: int,
    mixture: SpellMixture,
    keeps: tuple[int, ...] = (),
    symmetric: bool = True,
    search: bool = True,
) -> Scheme:
    """A weight-only scheme. `accuracy_level` 4 lets the CPU multiply in int8; 0 keeps the activations' type."""
    shared = _WeightOnly(bits, head_bits, symmetric, search, accuracy_level)
    return Scheme(
        name,
        summary,
        bits,
        shared.linear,
        shared.embedding,
        block_size=BLOCK_SIZE,
        mixture=mixture,
        keeps=functools.partial(_kept, keeps),
        rounding=shared.rounding,
        calibrate=weigh_errors,
    )
