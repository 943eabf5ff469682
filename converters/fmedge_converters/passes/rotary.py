"""Rotary embedding inside the attention node, with its cosines and sines in a table.

A traced graph computes cos and sin from position_ids in every step and rotates q and k of every layer in seven nodes
each. GroupQueryAttention rotates by itself, given tables [context, D / 2]. The tables are made by running the graph's
own cos and sin on the positions 0 .. context - 1, so every variant of the frequencies (linear, llama3, yarn, ...) is
right by construction. Rotations in halves (Llama) and interleaved (GPT-J, Cohere), of all or of the first D' of the D
dimensions, are recognised; what is not stays as it was traced.
RoFormer: https://arxiv.org/abs/2104.09864
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from fmedge_converters.graph import MICROSOFT, DecoderGraph, constant, dims, integers, produced_by
from fmedge_converters.weight import Array

TABLE_MULTIPLE = 8
"""GroupQueryAttention takes tables of D' / 2 columns only if that is a multiple of this."""


@dataclass(frozen=True, slots=True)
class Rotation:
    """A rotation that was found in the graph."""

    source: ir.Value  # [B, S, heads, D]
    cos: ir.Value  # [B, S, D']
    sin: ir.Value  # [B, S, D']
    interleaved: bool


def fold_rotary_embeddings(graph: DecoderGraph, context: int) -> int:
    """Let the attention nodes rotate; returns how many of them do."""
    tables: dict[tuple[ir.Value, ir.Value, bool], tuple[ir.Value, ir.Value] | None] = {}
    changed = 0
    for node in list(graph.graph):
        if node.op_type != "GroupQueryAttention" or node.domain != MICROSOFT:
            continue
        query, key = _rotation(node.inputs[0]), _rotation(node.inputs[1])
        if query is None or key is None or (query.cos, query.sin) != (key.cos, key.sin):
            continue
        if query.interleaved != key.interleaved:
            continue
        wanted = (query.cos, query.sin, query.interleaved)
        if wanted not in tables:
            tables[wanted] = _tables(graph, query, context, len(tables))
        table = tables[wanted]
        if table is None:
            continue
        _rotate_inside(graph, node, query, key, table)
        changed += 1
    graph.remove_unused()
    position_ids = next((value for value in graph.graph.inputs if value.name == "position_ids"), None)
    if position_ids is not None and not position_ids.uses():
        graph.graph.inputs.remove(position_ids)
    return changed


def _rotate_inside(
    graph: DecoderGraph, node: ir.Node, query: Rotation, key: Rotation, table: tuple[ir.Value, ir.Value]
) -> None:
    for index, rotation in ((0, query), (1, key)):
        traced = node.inputs[index]
        if traced is None:
            raise RuntimeError("an attention node without its query or key")
        heads, size = (int(dim) for dim in (dims(rotation.source) or [])[2:])
        shape = graph.add_constant(f"shape.0x0x{heads * size}", np.array([0, 0, heads * size], np.int64))
        (flat,) = graph.insert(node, "Reshape", (rotation.source, shape), [(traced.dtype, traced.shape)])
        node.replace_input_with(index, flat)
    while len(node.inputs) < 9:
        node.resize_inputs(len(node.inputs) + 1)
    node.replace_input_with(7, table[0])
    node.replace_input_with(8, table[1])
    node.attributes["do_rotary"] = ir.AttrInt64("do_rotary", 1)
    node.attributes["rotary_interleaved"] = ir.AttrInt64("rotary_interleaved", int(query.interleaved))


def _rotation(flat: ir.Value | None) -> Rotation | None:
    """Match Reshape(Transpose(rotated [B, heads, S, D])) -> [B, S, heads * D] backwards."""
    reshape = produced_by(flat, "Reshape")
    outer = _swap_heads(reshape.inputs[0]) if reshape is not None else None
    if outer is None:
        return None
    found = _partial(outer) or _whole(outer)
    if found is None:
        return None
    source, cos, sin, interleaved = found
    before = _swap_heads(source)
    if before is None or len(dims(before) or ()) != 4:
        return None
    cos_plain, sin_plain = _without_head_axis(cos), _without_head_axis(sin)
    if cos_plain is None or sin_plain is None:
        return None
    return Rotation(before, cos_plain, sin_plain, interleaved)


def _swap_heads(value: ir.Value | None) -> ir.Value | None:
    node = produced_by(value, "Transpose")
    if node is None or list(node.attributes.get_ints("perm", [])) != [0, 2, 1, 3]:
        return None
    return node.inputs[0]


def _without_head_axis(value: ir.Value) -> ir.Value | None:
    """Cos [B, S, D'] behind cos [B, 1, S, D']."""
    node = produced_by(value, "Unsqueeze")
    return node.inputs[0] if node is not None and integers(node.inputs[1]) == [1] else None


Found = tuple[ir.Value, ir.Value, ir.Value, bool]


def _partial(value: ir.Value) -> Found | None:
    """Concat(rotated(x[..., :r]), x[..., r:])."""
    node = produced_by(value, "Concat")
    if node is None or len(node.inputs) != 2 or not _last_axis(node, value):
        return None
    rotated, rest = node.inputs
    found = _whole(rotated) if rotated is not None else None
    if found is None or rest is None:
        return None
    head, tail = _slice(found[0]), _slice(rest)
    if head is None or tail is None or head[0] is not tail[0]:
        return None
    size = (dims(head[0]) or [0])[-1]
    whole = head[1] == 0 and head[2] == tail[1] and tail[2] == size and head[3] == tail[3] == 1
    return (head[0], *found[1:]) if whole else None


def _whole(value: ir.Value) -> Found | None:
    """X * cos + rotated(x) * sin."""
    addition = produced_by(value, "Add")
    products = [produced_by(item, "Mul") for item in addition.inputs] if addition is not None else []
    if len(products) != 2:
        return None
    for plain, turned in (products, products[::-1]):
        if plain is None or turned is None:
            return None
        for x, cos in (plain.inputs, plain.inputs[::-1]):
            for half, sin in (turned.inputs, turned.inputs[::-1]):
                if x is None or cos is None or half is None or sin is None:
                    continue
                interleaved = _turned(half, x)
                if interleaved is not None:
                    return x, cos, sin, interleaved
    return None


def _turned(value: ir.Value, x: ir.Value) -> bool | None:
    """False if the value is x with its halves swapped and the second negated, True if it is so in pairs."""
    size = (dims(x) or [""])[-1]
    if not isinstance(size, int):
        return None
    halves = produced_by(value, "Concat")
    if halves is not None and len(halves.inputs) == 2 and _last_axis(halves, value):
        negated = produced_by(halves.inputs[0], "Neg")
        second, first = (_slice(negated.inputs[0]) if negated is not None else None), _slice(halves.inputs[1])
        if second is None or first is None or second[0] is not x or first[0] is not x:
            return None
        swapped = (first[1:], second[1:]) == ((0, size // 2, 1), (size // 2, size, 1))
        return False if swapped else None
    flat = produced_by(value, "Reshape")
    pairs = produced_by(flat.inputs[0], "Concat") if flat is not None else None
    if flat is None or pairs is None or len(pairs.inputs) != 2 or dims(value) != dims(x):
        return None
    stacked = [produced_by(item, "Unsqueeze") for item in pairs.inputs]
    if any(item is None or integers(item.inputs[1]) not in ([-1], [4]) for item in stacked):
        return None
    negated = produced_by(stacked[0].inputs[0], "Neg") if stacked[0] is not None else None
    odd = _slice(negated.inputs[0]) if negated is not None else None
    even = _slice(stacked[1].inputs[0]) if stacked[1] is not None else None
    if odd is None or even is None or odd[0] is not x or even[0] is not x:
        return None
    return True if (even[1:], odd[1:]) == ((0, size, 2), (1, size, 2)) else None


def _last_axis(node: ir.Node, value: ir.Value) -> bool:
    return node.attributes.get_int("axis", 0) in (-1, len(dims(value) or ()) - 1)


def _slice(value: ir.Value | None) -> tuple[ir.Value, int, int, int] | None:
    """Source, start, stop and step of a slice of the last axis."""
    node = produced_by(value, "Slice")
    if node is None or node.inputs[0] is None:
        return None
    shape = dims(node.inputs[0])
    numbers = [integers(item) for item in node.inputs[1:5]]
    if shape is None or not isinstance(shape[-1], int) or any(item is None or len(item) != 1 for item in numbers):
        return None
    start, stop, axis, *step = (item[0] for item in numbers if item is not None)
    if axis not in (-1, len(shape) - 1):
        return None
    start, stop, jump = slice(start, stop, step[0] if step else 1).indices(shape[-1])
    return node.inputs[0], start, stop, jump


def _tables(graph: DecoderGraph, rotation: Rotation, context: int, number: int) -> tuple[ir.Value, ir.Value] | None:
    """Run the graph's cos and sin on all positions; None if they depend on more than positions."""
    arrays = _evaluate(graph, [rotation.cos, rotation.sin], context)
    if arrays is None:
        return None
    tables = []
    for part, array in zip(("cos", "sin"), arrays, strict=True):
        size = array.shape[-1]
        if rotation.interleaved:
            first, second = array[:, 0::2], array[:, 1::2]
        else:
            first, second = array[:, : size // 2], array[:, size // 2 :]
        if not np.array_equal(first, second) or first.shape[-1] % TABLE_MULTIPLE:
            return None
        tables.append(graph.add_constant(f"rotary.{number}.{part}", np.ascontiguousarray(first)))  # [C, D' / 2]
    return tables[0], tables[1]


def _evaluate(graph: DecoderGraph, values: list[ir.Value], context: int) -> list[Array] | None:
    """The values [C, D'] for position_ids = 0 .. C - 1, computed by ONNX's reference implementation."""
    try:
        part = ir.convenience.extract(graph.graph, inputs=["position_ids"], outputs=values)
    except ValueError:
        # They depend on another input.
        return None
    if any(constant(value) is None for value in part.initializers.values()):
        return None
    evaluator = ReferenceEvaluator(ir.to_proto(ir.Model(part, ir_version=graph.model.ir_version)))
    positions = np.arange(context, dtype=np.int64)[None]  # [1, C]
    return [np.asarray(array)[0] for array in evaluator.run(None, {"position_ids": positions})]
