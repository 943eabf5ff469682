"""The lookup of tokens: Gather(weight [V, E], input_ids), or one of a range of them."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from fmedge_converters.graph import DecoderGraph

TOKENS = "input_ids"


@dataclass(frozen=True, slots=True)
class Lookup:
    """A lookup, read."""

    node: ir.Node
    weight: ir.Value  # [V, E]
    ids: ir.Value  # [B, S]
    output: ir.Value  # [B, S, E]


def lookups(graph: DecoderGraph) -> list[Lookup]:
    """All lookups of tokens, in the order of the graph."""
    found = []
    for node in graph.graph:
        if node.op_type != "Gather" or node.domain or node.attributes.get_int("axis", 0) != 0:
            continue
        weight, ids = node.inputs
        known = graph.weight(weight)
        if (
            weight is not None
            and ids is not None
            and known is not None
            and str(ids.name).partition("[")[0] == TOKENS
            and len(known.shape) == 2
        ):
            found.append(Lookup(node, weight, ids, node.outputs[0]))
    return found
