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
from fmedge_converters.weight import Array, Weight

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
    values = torch.nn.functional.pad(values, (0, blocks * block_size - size))
    values = values.view(count, blocks, block_size)  # [n, blocks, block_size]
    largest = values.abs().argmax(-1, keepdim=True)
    scales = values.gather(-1, largest) / -levels  # [n, blocks, 1]
    inverse = torch.where(scales == 0, 0.0, 1.0 / scales)
    codes = (values * inverse).round_().clamp_(-levels, levels - 1).add_(levels).to(torch.uint8)
    if bits == 4:
        codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return codes.numpy(), scales.squeeze(-1).numpy()


class QuantizedMatrix:
    """Bytes and scales of one matrix, quantized together by blocks of rows when the first of them is read.

    Each is handed out once and then forgotten, so what stays in memory is one quantized matrix at most.
    """

    def __init__(self, weight: Weight, bits: int, block_size: int) -> None:
        self.weight = weight
        self.bits = bits
        self.block_size = block_size
        self.blocks = -(-weight.shape[1] // block_size)
        self._made: dict[str, Array] = {}

    def read(self, part: str) -> Array:
        """The "codes" [N, blocks, block_size * bits / 8] or the "scales" [N, blocks]."""
        if part not in self._made:
            pieces = [quantize_blocks(rows, self.bits, self.block_size) for rows in self.weight.blocks()]
            self._made["codes"] = np.concatenate([codes for codes, _ in pieces])
            self._made["scales"] = np.concatenate([scales for _, scales in pieces]).astype(self.weight.dtype)
        return self._made.pop(part)


def _add_quantized(
    graph: DecoderGraph, name: str, weight: Weight, bits: int, block_size: int, flat: bool
) -> tuple[ir.Value, ir.Value]:
    """Initializers for codes and scales; `flat` joins the blocks of a row, which the embedding's operator wants."""
    matrix = QuantizedMatrix(weight, bits, block_size)
    rows, row_bytes = weight.shape[0], block_size * bits // 8
    codes_shape = (rows, matrix.blocks * row_bytes) if flat else (rows, matrix.blocks, row_bytes)
    values = []
    for part, shape, dtype in (
        ("codes", codes_shape, np.dtype(np.uint8)),
        ("scales", (rows, matrix.blocks), weight.dtype),
    ):
        tensor = ir.LazyTensor(
            functools.partial(_tensor_of, matrix, part, shape),
            dtype=ir.DataType.from_numpy(dtype),
            shape=ir.Shape(shape),
            name=f"{name}.{part}",
        )
        value = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        graph.graph.register_initializer(value)
        values.append(value)
    return values[0], values[1]


def _tensor_of(matrix: QuantizedMatrix, part: str, shape: tuple[int, ...]) -> ir.TensorProtocol:
    return ir.tensor(matrix.read(part).reshape(shape))


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
    codes, scales = _add_quantized(graph, f"{linear.name}.int{width}", weight, width, block_size, flat=False)
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
    """The same codes as the head's when both are tied: the writer stores equal bytes once."""
    del tied
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
    name = f"{embedding.weight.name}.rows.int{bits}"
    codes, scales = _add_quantized(graph, name, weight, bits, block_size, flat=True)
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
