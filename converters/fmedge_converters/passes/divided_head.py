"""A head divided into ranges of token ids, each with a matrix of its own, so that they can be rounded differently.

    logits = Concat(Linear(x, W[0:a]), Linear(x, W[a:V]))

A token embedding that is the head's matrix is looked up in the range that the token is in.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import onnx_ir as ir

from fmedge_converters.graph import DecoderGraph, replace
from fmedge_converters.passes.linear import Linear, insert_linear
from fmedge_converters.passes.lookup import Lookup, lookups
from fmedge_converters.weight import rows_of


def can_be_divided(graph: DecoderGraph, head: Linear) -> bool:
    """Whether nothing but the head and lookups of tokens uses its matrix, which has no codes of a source."""
    known = {head.node, *(lookup.node for lookup in lookups(graph))}
    bias = head.bias is None or graph.weight(head.bias) is not None
    return bias and graph.weights[head.name].packed is None and all(use.node in known for use in head.weight.uses())


def part_name(name: str, start: int, stop: int) -> str:
    """Of the weight that has these rows of another."""
    return f"{name}[{start}:{stop}]"


def divide_head(graph: DecoderGraph, head: Linear, starts: Sequence[int]) -> list[str]:
    """Divide a head in front of these rows; returns the names of the parts' weights."""
    weight = graph.weights[head.name]
    ends = list(pairwise((0, *starts, weight.rows)))
    values = [graph.add_weight(part_name(head.name, *rows), rows_of(weight, *rows)) for rows in ends]
    products = []
    for rows, value in zip(ends, values, strict=True):
        part = None
        if head.bias is not None:
            name = str(head.bias.name)
            part = graph.add_weight(part_name(name, *rows), rows_of(graph.weights[name], *rows))
        products.append(insert_linear(graph, head.node, head.x, value, part, head.output, head=True))
    like = [(head.output.dtype, head.output.shape)]
    (logits,) = graph.insert(head.node, "Concat", products, like, {"axis": -1})
    for lookup in lookups(graph):
        if lookup.weight is head.weight:
            _divide_lookup(graph, lookup, values, ends)
    replace(head.output, logits)
    graph.remove_unused()
    return [str(value.name) for value in values]


def _divide_lookup(
    graph: DecoderGraph, lookup: Lookup, values: Sequence[ir.Value], ends: Sequence[tuple[int, int]]
) -> None:
    """Look tokens up in every range, and take the one that they are in."""
    node, ids, output = lookup.node, lookup.ids, lookup.output
    like = [(ids.dtype, ids.shape)]
    first = graph.add_constant("tokens.0", np.array(0, np.int64))
    last_axis = graph.add_constant("tokens.axis", np.array([-1], np.int64))
    found: ir.Value | None = None
    for (start, stop), value in zip(ends, values, strict=True):
        offset, last = (
            graph.add_constant(f"tokens.{number}", np.array(number, np.int64)) for number in (start, stop - start - 1)
        )
        (moved,) = graph.insert(node, "Sub", (ids, offset), like)
        (inside,) = graph.insert(node, "Clip", (moved, first, last), like)
        inside.name = part_name(str(ids.name), start, stop)  # by which it is known as tokens
        (rows,) = graph.insert(node, "Gather", (value, inside), [(output.dtype, output.shape)])
        if found is None:
            found = rows
            continue
        kind = ir.DataType.BOOL
        (behind,) = graph.insert(node, "GreaterOrEqual", (ids, offset), [(kind, ids.shape)])
        (column,) = graph.insert(node, "Unsqueeze", (behind, last_axis), [(kind, [*list(ids.shape or ()), 1])])
        (found,) = graph.insert(node, "Where", (column, rows, found), [(output.dtype, output.shape)])
    assert found is not None
    replace(output, found)
