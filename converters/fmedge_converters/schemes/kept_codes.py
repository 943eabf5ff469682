"""Matrices that have codes already, of their source or fitted to text, with scales and zero points untouched.

MatMulNBits and GatherBlockQuantized compute (code - zero) * scale, which is what the source's own format says. Columns
that the source sorted (act-order) are sorted in the activations too: by a Gather in front of the product, one for all
products that share input and order.
"""

from __future__ import annotations

import hashlib

import numpy as np
import onnx_ir as ir

from fmedge_converters.graph import MICROSOFT, DecoderGraph
from fmedge_converters.passes.linear import Linear
from fmedge_converters.passes.lookup import Lookup
from fmedge_converters.scales import add_scales
from fmedge_converters.schemes.matmul_nbits import Blocks, insert_matmul_nbits
from fmedge_converters.weight import Array, PackedMatrix, Weight, reshaped


def spell_kept_linear(graph: DecoderGraph, linear: Linear, packed: PackedMatrix, accuracy_level: int) -> None:
    """MatMulNBits with the codes of the source."""
    weight = graph.weights[linear.name]
    codes, scales, zero_points = _add_packed(graph, linear.name, weight, packed)
    x = linear.x if packed.columns is None else sorted_columns(graph, linear, packed.columns)
    insert_matmul_nbits(
        graph,
        linear,
        (x, codes, scales, zero_points),
        Blocks(weight.shape, packed.bits, packed.block_size),
        accuracy_level,
    )


def kept_embedding_rows(graph: DecoderGraph, embedding: Lookup, packed: PackedMatrix) -> ir.Value:
    """GatherBlockQuantized with the codes of the source: rows [B, S, E], E padded to whole blocks."""
    name = str(embedding.weight.name)
    weight = graph.weights[name]
    codes, scales, zero_points = _add_packed(graph, f"{name}.rows", weight, packed, flat=True)
    size = -(-weight.shape[1] // packed.block_size) * packed.block_size
    inputs = (codes, embedding.ids, scales) if zero_points is None else (codes, embedding.ids, scales, zero_points)
    (rows,) = graph.insert(
        embedding.node,
        "GatherBlockQuantized",
        inputs,
        [(embedding.output.dtype, [*list(embedding.output.shape or ())[:-1], size])],
        {"bits": packed.bits, "block_size": packed.block_size, "gather_axis": 0, "quantize_axis": 1},
        MICROSOFT,
    )
    return rows


def _add_packed(
    graph: DecoderGraph, name: str, weight: Weight, packed: PackedMatrix, *, flat: bool = False
) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """Initializers for codes, scales and zero points; `flat` joins the blocks of a row."""
    rows, size = weight.shape
    blocks = -(-size // packed.block_size)
    row_bytes = packed.block_size * packed.bits // 8
    codes = Weight((rows, blocks, row_bytes), np.dtype(np.uint8), packed.codes)
    if flat:
        codes = reshaped(codes, (rows, blocks * row_bytes))
    scales = Weight((rows, blocks), packed.scale_dtype or weight.dtype, packed.scales)
    stem = f"{name}.int{packed.bits}"
    values = [
        graph.add_weight(f"{stem}.codes", codes),
        add_scales(graph, f"{stem}.scales", scales, weight.dtype),
    ]
    if packed.zero_points is None:
        return values[0], values[1], None
    zero_points = Weight((rows, -(-blocks * packed.bits // 8)), np.dtype(np.uint8), packed.zero_points)
    return values[0], values[1], graph.add_weight(f"{stem}.zero_points", zero_points)


def sorted_columns(graph: DecoderGraph, linear: Linear, columns: Array) -> ir.Value:
    """The input of a product with its features in the order of the weight's columns."""
    digest = hashlib.sha256(columns.tobytes()).hexdigest()[:12]
    indices = graph.add_constant(f"columns.{digest}", columns.astype(np.int64))
    for user, place in linear.x.uses():
        if user.op_type == "Gather" and place == 0 and user.inputs[1] is indices:
            return user.outputs[0]
    users = {user for user, _ in linear.x.uses()}
    earliest = next(node for node in graph.graph if node in users)
    like = [(linear.x.dtype, linear.x.shape)]
    (value,) = graph.insert(earliest, "Gather", (linear.x, indices), like, {"axis": -1})
    return value
