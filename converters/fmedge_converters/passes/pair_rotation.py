"""Rotary embedding of pairs as one operator: ONNX Runtime's RotaryEmbedding.

Traced, each pair (x0, x1) of a head is turned by products that are broadcast over heads along short axes, for which
ONNX Runtime has no fast loop. Two spellings are recognised: a matrix [..., n, 2, 2] times the pair, and x * cos plus
the turned pair * sin. Whether the numbers are those of a rotation is seen by running that part of the graph.
RoFormer: https://arxiv.org/abs/2104.09864
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from fmedge_converters.graph import MICROSOFT, DecoderGraph, constant, dims, integers, produced_by, replace
from fmedge_converters.weight import Array

AXES = {"batch": 2, "height": 32, "width": 64, "sequence": 5, "image_sequence": 12}
"""Sizes of dynamic axes in that run; of others the first one's."""


@dataclass(frozen=True, slots=True)
class Angles:
    """Where cosines and sines of a rotation are: [b, 1, S, n, 2] or [b, S, 1, n, 2], of whose last axis one is read.

    The last two axes may be one.
    """

    cos: ir.Value
    sin: ir.Value
    sin_place: int
    matrix: ir.Value | None = None
    """The matrix' other column; None where the numbers are given twice."""


@dataclass(frozen=True, slots=True)
class Tables:
    """What the operator takes of one rotation."""

    positions: ir.Value  # [B, S], or [1]: where they start
    cos: ir.Value  # [B * S or S, n]
    sin: ir.Value


def rotate_pairs(graph: DecoderGraph, _context: int) -> int:
    """Let RotaryEmbedding turn the pairs; returns how many rotations there were."""
    tables: dict[Angles, Tables | None] = {}
    changed = 0
    for node in list(graph.graph):
        if node.op_type != "Add" or node.domain:
            continue
        found = _product(node) or _sum(node)
        if found is None:
            continue
        source, angles, output = found
        if angles not in tables:
            tables[angles] = _tables(graph, node, source, angles) if _rotates(graph, angles) else None
        table = tables[angles]
        if table is None:
            continue
        replace(output, _rotated(graph, node, source, angles, table))
        changed += 1
    graph.remove_unused()
    return changed


Found = tuple[ir.Value, Angles, ir.Value]
"""The states [B, N, S, D] or [B, S, N, D], the angles, and the rotated states."""


def _product(node: ir.Node) -> Found | None:
    """Column 0 of the matrix times x0, plus column 1 times x1: [..., n, 2], reshaped to [..., D]."""
    reshape = _only_user(node.outputs[0], "Reshape")
    products = [produced_by(item, "Mul") for item in node.inputs]
    if reshape is None or any(item is None for item in products):
        return None
    places: dict[int, tuple[ir.Value, ir.Value]] = {}
    pairs: set[ir.Value] = set()
    for product in products:
        assert product is not None
        for column, x in (product.inputs, product.inputs[::-1]):
            chosen, of_matrix = _chosen(x), _chosen(column)
            pair = produced_by(chosen[0], "Reshape") if chosen is not None else None
            if chosen is None or of_matrix is None or chosen[1] != of_matrix[1] or pair is None or column is None:
                continue
            if (dims(pair.outputs[0]) or [])[-2:] == [1, 2] and pair.inputs[0] is not None:
                places[chosen[1]] = column, of_matrix[0]
                pairs.add(pair.inputs[0])
                break
    if places.keys() != {0, 1} or len(pairs) != 1 or places[0][1] is not places[1][1]:
        return None
    (source,) = pairs
    output = reshape.outputs[0]
    if dims(source) is None or dims(source) != dims(output):
        return None
    angles = Angles(places[0][0], places[0][0], 1, matrix=places[1][0])
    return (source, angles, output) if _heads_axis(source, angles) is not None else None


def _sum(node: ir.Node) -> Found | None:
    """The states times cos, plus the turned ones times sin, where the pair (x0, x1) is turned to (-x1, x0)."""
    products = [produced_by(item, "Mul") for item in node.inputs]
    for plain, turned in (products, products[::-1]):
        if plain is None or turned is None:
            return None
        for half, sin in (turned.inputs, turned.inputs[::-1]):
            source = _turned(half)
            if source is None or source not in plain.inputs or sin is None:
                continue
            cos = plain.inputs[1 - list(plain.inputs).index(source)]
            angles = Angles(cos, sin, 0) if cos is not None else None
            if angles is not None and _heads_axis(source, angles) is not None:
                return source, angles, node.outputs[0]
    return None


def _turned(value: ir.Value | None) -> ir.Value | None:
    """The x of which this is (-x1, x0), pair by pair."""
    flat = produced_by(value, "Reshape")
    both = produced_by(flat.inputs[0], "Concat") if flat is not None else None
    if both is None or len(both.inputs) != 2 or not _is_last(both, both.outputs[0]):
        return None
    first, second = (produced_by(item, "Unsqueeze") for item in both.inputs)
    if first is None or second is None:
        return None
    negated = produced_by(first.inputs[0], "Neg")
    odd, even = _chosen(negated.inputs[0]) if negated is not None else None, _chosen(second.inputs[0])
    if odd is None or even is None or (odd[1], even[1]) != (1, 0) or odd[0] is not even[0]:
        return None
    pairs = produced_by(odd[0], "Reshape")
    source = pairs.inputs[0] if pairs is not None else None
    if source is None or value is None or dims(source) is None or dims(source) != dims(value):
        return None
    return source if (dims(odd[0]) or [])[-1:] == [2] else None


def _chosen(value: ir.Value | None) -> tuple[ir.Value, int] | None:
    """The tensor of whose last axis one place is taken, and which."""
    gather = produced_by(value, "Gather")
    if gather is not None and gather.inputs[0] is not None:
        place, shape = integers(gather.inputs[1]), dims(gather.inputs[0])
        last = shape is not None and gather.attributes.get_int("axis", 0) in (-1, len(shape) - 1)
        return (gather.inputs[0], place[0]) if last and place is not None and len(place) == 1 else None
    squeeze = produced_by(value, "Squeeze")
    piece = produced_by(squeeze.inputs[0], "Slice") if squeeze is not None else None
    if piece is None or piece.inputs[0] is None:
        return None
    shape, numbers = dims(piece.inputs[0]), [integers(item) for item in piece.inputs[1:4]]
    if shape is None or any(item is None or len(item) != 1 for item in numbers):
        return None
    start, stop, axis = (item[0] for item in numbers if item is not None)
    squeezed = integers(squeeze.inputs[1]) if squeeze is not None and len(squeeze.inputs) > 1 else None
    last = axis in (-1, len(shape) - 1) and squeezed in ([-1], [len(shape) - 1])
    return (piece.inputs[0], start) if last and stop == start + 1 else None


def _is_last(node: ir.Node, value: ir.Value) -> bool:
    return node.attributes.get_int("axis", 0) in (-1, len(dims(value) or ()) - 1)


def _only_user(value: ir.Value, op: str) -> ir.Node | None:
    users = {use.node for use in value.uses()}
    node = next(iter(users)) if len(users) == 1 and not value.is_graph_output() else None
    return node if node is not None and node.op_type == op and not node.domain else None


def _heads_axis(source: ir.Value, angles: Angles) -> int | None:
    """The axis of the heads, 1 or 2: of so many in the states, of 1 in the angles; None if they do not fit."""
    states = dims(source)
    if states is None or len(states) != 4 or not isinstance(states[3], int) or states[3] % 2:
        return None
    wanted = [states[3] // 2, 2] if angles.matrix is not None else [states[3]]
    for value in (angles.cos, angles.sin):
        shape = dims(value)
        if shape is None or len(shape) != 3 + len(wanted) or shape[3:] != wanted or shape[0] not in (1, states[0]):
            return None
    shape = dims(angles.cos) or []
    sequence = {1: 2, 2: 1}
    for axis in (1, 2):
        fits = isinstance(states[axis], int) and shape[axis] == 1 and shape[sequence[axis]] != 1
        if fits and dims(angles.sin) == shape:
            return axis
    return None


def _rotates(graph: DecoderGraph, angles: Angles) -> bool:
    """Whether the numbers are those of a rotation: run on random inputs, to the bit."""
    wanted = [angles.cos, angles.sin, *([angles.matrix] if angles.matrix is not None else [])]
    found = _evaluate(graph, wanted)
    if found is None:
        return False
    if angles.matrix is not None:
        first, _, second = found
        return np.array_equal(first[..., 0], second[..., 1]) and np.array_equal(first[..., 1], -second[..., 0])
    return all(np.array_equal(array[..., 0::2], array[..., 1::2]) for array in found)


def _evaluate(graph: DecoderGraph, values: Sequence[ir.Value]) -> list[Array] | None:
    """The values for random inputs, by ONNX's reference implementation; None if they depend on weights."""
    try:
        part = ir.convenience.extract(graph.graph, inputs=list(graph.graph.inputs), outputs=list(dict.fromkeys(values)))
    except ValueError:
        return None
    if any(constant(value) is None for value in part.initializers.values()):
        return None
    random = np.random.default_rng(0)
    feeds = {}
    for value in part.inputs:
        shape = [dim if isinstance(dim, int) else AXES.get(str(dim), AXES["batch"]) for dim in dims(value) or ()]
        dtype = value.dtype.numpy() if value.dtype is not None else np.dtype(np.float32)
        feeds[str(value.name)] = random.integers(0, 9, shape).astype(dtype)
    evaluator = ReferenceEvaluator(ir.to_proto(ir.Model(part, ir_version=graph.model.ir_version)))
    found = dict(zip(dict.fromkeys(values), evaluator.run(None, feeds), strict=True))
    return [np.asarray(found[value]) for value in values]


def _tables(graph: DecoderGraph, before: ir.Node, source: ir.Value, angles: Angles) -> Tables:
    states, shape = dims(source) or [], dims(angles.cos) or []
    half = int(states[3]) // 2
    sequence = 2 if _heads_axis(source, angles) == 1 else 1
    pairs = graph.add_constant(f"shape.-1x{half}x2", np.array([-1, half, 2], np.int64))
    tables = []
    for value, place in ((angles.cos, 0), (angles.sin, angles.sin_place)):
        (rows,) = graph.insert(before, "Reshape", (value, pairs), [(value.dtype, ("rows", half, 2))])
        index = graph.add_constant(f"place.{place}", np.array(place, np.int64))
        (table,) = graph.insert(before, "Gather", (rows, index), [(value.dtype, ("rows", half))], {"axis": 2})
        tables.append(table)
    if shape[0] == 1:
        return Tables(graph.add_constant("positions.0", np.zeros(1, np.int64)), *tables)
    # Each row of the batch has angles of its own: it is told the places of its own rows of the table.
    integer = ir.DataType.INT64
    (sizes,) = graph.insert(before, "Shape", (angles.cos,), [(integer, (len(shape),))])
    axes = graph.add_constant(f"axes.0x{sequence}", np.array([0, sequence], np.int64))
    (plane,) = graph.insert(before, "Gather", (sizes, axes), [(integer, (2,))])
    (count,) = graph.insert(before, "ReduceProd", (plane,), [(integer, ())], {"keepdims": 0})
    zero, one = (graph.add_constant(f"place.{number}", np.array(number, np.int64)) for number in (0, 1))
    (places,) = graph.insert(before, "Range", (zero, count, one), [(integer, ("rows",))])
    (positions,) = graph.insert(before, "Reshape", (places, plane), [(integer, (shape[0], shape[sequence]))])
    return Tables(positions, *tables)


def _rotated(graph: DecoderGraph, before: ir.Node, source: ir.Value, angles: Angles, tables: Tables) -> ir.Value:
    batch, first, second, size = dims(source) or []
    inputs, attributes = [source, tables.positions, tables.cos, tables.sin], {"interleaved": 1}
    if _heads_axis(source, angles) == 1:
        (rotated,) = graph.insert(
            before, "RotaryEmbedding", inputs, [(source.dtype, source.shape)], attributes, MICROSOFT
        )
        return rotated
    # The operator takes heads in front of the sequence, or side by side.
    heads, flat = int(second), [batch, first, int(second) * int(size)]
    side = graph.add_constant(f"shape.0x0x{flat[2]}", np.array([0, 0, flat[2]], np.int64))
    apart = graph.add_constant(f"shape.0x0x{heads}x{size}", np.array([0, 0, heads, size], np.int64))
    (inputs[0],) = graph.insert(before, "Reshape", (source, side), [(source.dtype, flat)])
    (turned,) = graph.insert(
        before, "RotaryEmbedding", inputs, [(source.dtype, flat)], attributes | {"num_heads": heads}, MICROSOFT
    )
    (rotated,) = graph.insert(before, "Reshape", (turned, apart), [(source.dtype, source.shape)])
    return rotated
