"""Weight-only rounding in blocks: MatMulNBits, and GatherBlockQuantized for the embedding.

A block of `block_size` weights along K shares a scale; q = round(w / scale) + 2 ** (bits - 1), unsigned, with
scale = w* / -2 ** (bits - 1), where w* is the block's weight of largest magnitude with its sign, so that this weight,
which matters most, is represented exactly. The operators take 2 ** (bits - 1) as zero point when none is given.
Operators: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md (MatMulNBits,
GatherBlockQuantized).
"""

from __future__ import annotations

import functools

import numpy as np
import onnx_ir as ir
import torch

from fmedge_converters.graph import MICROSOFT, DecoderGraph, replace
from fmedge_converters.passes.linear import Linear
from fmedge_converters.schemes.kept_codes import kept_embedding_rows, spell_kept_linear
from fmedge_converters.schemes.scheme import Embedding, Scheme, SpellMixture
from fmedge_converters.weight import Array, Weight, reshaped

BLOCK_SIZE = 128
"""The default, by measurement: docs/quantization.md."""


def quantize_blocks(rows: Array, bits: int, block_size: int) -> tuple[Array, Array]:
    """Quantize rows [n, K] to packed bytes [n, blocks, block_size * bits / 8] and float32 scales [n, blocks].

    K is padded with zeros to whole blocks. Two 4-bit weights share a byte, the even one in its low half.
    """
    count, size = rows.shape
    blocks = -(-size // block_size)
    levels = 1 << (bits - 1)
    values = torch.from_numpy(rows).to(torch.float32)
    if size != blocks * block_size:
        values = torch.nn.functional.pad(values, (0, blocks * block_size - size))
    values = values.view(count, blocks, block_size)  # [n, blocks, block_size]
    # Both extremes by themselves, and int8 before uint8: torch has no fast kernels for aminmax and for float to uint8.
    lowest, highest = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    scales = torch.where(-lowest > highest, lowest, highest) / -levels  # [n, blocks, 1]
    inverse = torch.where(scales == 0, 0.0, 1.0 / scales)
    signed = (values * inverse).round_().clamp_(max=levels - 1).to(torch.int8)
    codes = signed.view(torch.uint8).add_(levels)  # which wraps around to the positive side
    if bits == 4:
        pairs = codes.view(torch.int16)  # the even code in the low byte
        codes = (pairs | (pairs >> 4)).to(torch.uint8)
    return codes.numpy(), scales.squeeze(-1).numpy()


class QuantizedMatrix:
    """Codes and scales of a matrix [N, K], or of matrices [E, N, K], which are read by blocks of axis 0.

    The scales of what was read as codes are kept until they are read, so that nothing is quantized twice when all codes
    are read before the scales.
    """

    def __init__(self, weight: Weight, bits: int, block_size: int) -> None:
        self._weight = weight
        self._bits = bits
        self._block_size = block_size
        self._kept: dict[tuple[int, int], Array] = {}
        self._blocks = -(-weight.shape[-1] // block_size)

    @property
    def codes(self) -> Weight:
        """Packed bytes [..., N, blocks, block_size * bits / 8]."""
        shape = (*self._weight.shape[:-1], self._blocks, self._block_size * self._bits // 8)
        return Weight(shape, np.dtype(np.uint8), self._codes, step=self._weight.rows_at_once)

    @property
    def scales(self) -> Weight:
        """Scales [..., N, blocks] in the dtype of the matrix."""
        shape = (*self._weight.shape[:-1], self._blocks)
        return Weight(shape, self._weight.dtype, self._scales, step=self._weight.rows_at_once)

    def _codes(self, start: int, stop: int) -> Array:
        rows = self._weight.read(start, stop)
        codes, scales = quantize_blocks(rows.reshape(-1, rows.shape[-1]), self._bits, self._block_size)
        self._kept[start, stop] = scales.astype(self._weight.dtype).reshape(*rows.shape[:-1], -1)
        return codes.reshape(*rows.shape[:-1], *codes.shape[1:])

    def _scales(self, start: int, stop: int) -> Array:
        if (start, stop) not in self._kept:
            self._codes(start, stop)
        return self._kept.pop((start, stop))


def joined_blocks(codes: Weight) -> Weight:
    """Codes [..., N, blocks, bytes] as [..., N, blocks * bytes]; the bytes are the same."""
    return reshaped(codes, (*codes.shape[:-2], codes.shape[-2] * codes.shape[-1]))


def _add_quantized(graph: DecoderGraph, name: str, weight: Weight, bits: int, block_size: int) -> list[ir.Value]:
    """Initializers for codes [N, blocks, bytes] and scales."""
    matrix = QuantizedMatrix(weight, bits, block_size)
    return [graph.add_weight(f"{name}.codes", matrix.codes), graph.add_weight(f"{name}.scales", matrix.scales)]


def _spell_linear(
    graph: DecoderGraph,
    linear: Linear,
    *,
    is_head: bool,
    block_size: int,
    bits: int,
    head_bits: int,
    accuracy_level: int,
) -> None:
    weight = graph.weights[linear.name]
    if weight.packed is not None:
        spell_kept_linear(graph, linear, weight.packed, accuracy_level)
        return
    width = head_bits if is_head else bits
    codes, scales = _add_quantized(graph, f"{linear.name}.int{width}", weight, width, block_size)
    inputs: list[ir.Value | None] = [linear.x, codes, scales]
    if linear.bias is not None:
        inputs += [None, None, linear.bias]
    (product,) = graph.insert(
        linear.node,
        "MatMulNBits",
        inputs,
        [(linear.output.dtype, linear.output.shape)],
        {
            "K": weight.shape[1],
            "N": weight.shape[0],
            "bits": width,
            "block_size": block_size,
            "accuracy_level": accuracy_level,
        },
        MICROSOFT,
    )
    replace(linear.output, product)


def _spell_embedding(graph: DecoderGraph, embedding: Embedding, *, tied: bool, block_size: int, head_bits: int) -> None:
    """The head's codes when both are tied, without their axis of blocks: the writer stores equal bytes once."""
    del tied  # codes have names: those that the head has made are found
    weight = graph.weights[str(embedding.weight.name)]
    size = weight.shape[1]
    packed = weight.packed if weight.packed is not None and weight.packed.columns is None else None
    if packed is not None:
        block_size = packed.block_size
        rows = kept_embedding_rows(graph, embedding, packed)
    else:
        rows = _embedding_rows(graph, embedding, weight, head_bits, block_size)
    padded = -(-size // block_size) * block_size
    if padded != size:
        numbers = [graph.add_constant(f"slice.{number}", np.array([number], np.int64)) for number in (0, size, 2)]
        (rows,) = graph.insert(
            embedding.node, "Slice", (rows, *numbers), [(embedding.output.dtype, embedding.output.shape)]
        )
    replace(embedding.output, rows)


def _embedding_rows(graph: DecoderGraph, embedding: Embedding, weight: Weight, bits: int, block_size: int) -> ir.Value:
    """Rows [B, S, E], E padded to whole blocks."""
    name = f"{embedding.weight.name}.int{bits}"
    codes, scales = _add_quantized(graph, name, weight, bits, block_size)
    codes = graph.add_weight(f"{name}.rows", joined_blocks(graph.weights[str(codes.name)]))
    padded = -(-weight.shape[1] // block_size) * block_size
    (rows,) = graph.insert(
        embedding.node,
        "GatherBlockQuantized",
        (codes, embedding.ids, scales),
        [(embedding.output.dtype, [*list(embedding.output.shape or ())[:-1], padded])],
        {"bits": bits, "block_size": block_size, "gather_axis": 0, "quantize_axis": 1},
        MICROSOFT,
    )
    return rows


def weight_only(
    name: str,
    summary: str,
    bits: int,
    *,
    head_bits: int,
    accuracy_level: int,
    mixture: SpellMixture,
    keeps: tuple[int, ...] = (),
) -> Scheme:
    """A weight-only scheme. `accuracy_level` 4 lets the CPU multiply in int8; 0 keeps the activations' type."""
    return Scheme(
        name,
        summary,
        bits,
        functools.partial(_spell_linear, bits=bits, head_bits=head_bits, accuracy_level=accuracy_level),
        functools.partial(_spell_embedding, head_bits=head_bits),
        block_size=BLOCK_SIZE,
        mixture=mixture,
        keeps=keeps,
    )
