"""Projections of the same input in one product: q, k and v, and gate and up of a gated MLP.

q, k and v that go straight into GroupQueryAttention are handed to it packed; others are split again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import chain

import numpy as np
import onnx_ir as ir

from fmedge_converters.graph import MICROSOFT, DecoderGraph, constant, replace
from fmedge_converters.passes.linear import Linear, insert_linear, linears
from fmedge_converters.weight import Weight, concatenated, joinable, weight_from_array


def merge_projections(graph: DecoderGraph, _context: int) -> int:
    """Merge Linear nodes that share their input; those with a source's codes only where the codes can be joined."""
    groups: dict[ir.Value, list[list[Linear]]] = defaultdict(list)
    for linear in linears(graph):
        if linear.exact:
            continue
        weight, alike = graph.weights[linear.name], groups[linear.x]
        group = next((group for group in alike if joinable(graph.weights[group[0].name], weight)), None)
        if group is None:
            alike.append([linear])
        else:
            group.append(linear)
    changed = 0
    for group in chain.from_iterable(groups.values()):
        if len(group) > 1 and not any(linear.output.is_graph_output() for linear in group):
            _merge(graph, group)
            changed += 1
    graph.remove_unused()
    return changed


def _merge(graph: DecoderGraph, group: Sequence[Linear]) -> None:
    attention = _packing_attention(group)
    if attention is not None:
        by_output = {linear.output: linear for linear in group}
        group = [by_output[value] for value in attention.inputs[:3] if value is not None]
    first = group[0]
    weights = [graph.weights[linear.name] for linear in group]
    # Whole names: a weight that layers share may be joined with a different one in each.
    name = "+".join(linear.name for linear in group)
    matrix = graph.add_weight(name, concatenated(weights))
    bias = None
    if any(linear.bias is not None for linear in group):
        parts = [_bias(graph, linear, weight) for linear, weight in zip(group, weights, strict=True)]
        bias = graph.add_weight(f"{name}.bias", concatenated(parts))
    # The first of the group in the graph's order stands in front of all its users.
    merged = insert_linear(
        graph,
        first.node if attention is None else _earliest(graph, group),
        first.x,
        matrix,
        bias,
        first.output,
    )
    if attention is not None:
        attention.replace_input_with(0, merged)
        attention.replace_input_with(1, None)
        attention.replace_input_with(2, None)
        return
    sizes = [weight.shape[0] for weight in weights]
    lengths = graph.add_constant(f"split.{'+'.join(map(str, sizes))}", np.array(sizes, np.int64))
    parts_like = [(linear.output.dtype, linear.output.shape) for linear in group]
    parts_out = graph.insert(first.node, "Split", (merged, lengths), parts_like, {"axis": -1})
    for linear, part in zip(group, parts_out, strict=True):
        replace(linear.output, part)


def _earliest(graph: DecoderGraph, group: Sequence[Linear]) -> ir.Node:
    nodes = {linear.node for linear in group}
    return next(node for node in graph.graph if node in nodes)


def _packing_attention(group: Sequence[Linear]) -> ir.Node | None:
    """The attention node that takes exactly these outputs as query, key and value, and nothing else does."""
    if len(group) != 3:
        return None
    users = {use.node for linear in group for use in linear.output.uses()}
    if len(users) != 1 or any(len(list(linear.output.uses())) != 1 for linear in group):
        return None
    node = users.pop()
    outputs = {linear.output for linear in group}
    is_attention = node.op_type == "GroupQueryAttention" and node.domain == MICROSOFT
    return node if is_attention and set(node.inputs[:3]) == outputs else None


def _bias(graph: DecoderGraph, linear: Linear, weight: Weight) -> Weight:
    if linear.bias is None:
        return weight_from_array(np.zeros(weight.shape[0], weight.dtype))
    found = graph.weight(linear.bias)
    folded = constant(linear.bias, weight.shape[0]) if found is None else None
    if folded is not None:
        return weight_from_array(folded)
    if found is None:
        raise RuntimeError(f"the bias of {linear.name} is neither a parameter nor a constant")
    return found
