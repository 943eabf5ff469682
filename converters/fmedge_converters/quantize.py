"""Spell every weight of a graph by a scheme: the experts, the linears, the head, the token embedding."""

from __future__ import annotations

from fmedge_converters.graph import DecoderGraph
from fmedge_converters.passes.experts import expand_experts
from fmedge_converters.passes.linear import linears
from fmedge_converters.passes.mixture import mixtures
from fmedge_converters.schemes.floating import FLOATING
from fmedge_converters.schemes.scheme import Embedding, Scheme


def quantize(graph: DecoderGraph, scheme: Scheme, block_size: int) -> None:
    """Replace mixtures of experts, Linear nodes and the lookup of tokens. The last Linear of a decoder is its head."""
    for mixture in mixtures(graph):
        if scheme.mixture is not None:
            scheme.mixture(graph, mixture, block_size=block_size)
    expand_experts(graph)
    projections = linears(graph)
    head = projections[-1] if projections else None
    embeddings = _embeddings(graph)
    tied = {embedding.node: head is not None and head.weight is embedding.weight for embedding in embeddings}
    # Last first: what a Linear reads may be the output of another, which is replaced in its turn.
    for linear in reversed(projections):
        spell = FLOATING.linear if linear.exact else scheme.linear
        spell(graph, linear, is_head=linear is head, block_size=block_size)
    for embedding in embeddings:
        scheme.embedding(graph, embedding, tied=tied[embedding.node], block_size=block_size)
    graph.remove_unused()


def _embeddings(graph: DecoderGraph) -> list[Embedding]:
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
            and ids.name == "input_ids"
            and len(known.shape) == 2
        ):
            found.append(Embedding(node, weight, ids, node.outputs[0]))
    return found
