"""Spell every weight of a graph by a scheme: the experts, the linears, the head, the token embedding."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from fmedge_runtimes.errors import ExportError

from fmedge_converters.graph import DecoderGraph
from fmedge_converters.passes.experts import expand_experts
from fmedge_converters.passes.linear import linears
from fmedge_converters.passes.mixture import expert_linears, mixtures
from fmedge_converters.schemes.floating import FLOATING
from fmedge_converters.schemes.scheme import Embedding, Scheme


@dataclass(frozen=True, slots=True)
class Quantization:
    """What became of a graph's matrices. Those of all experts count as one where one operator has them."""

    matrices: int
    kept: int
    """Those that have the codes of their source."""
    block_size: int | None
    """Weights that share a scale, in most of them; None for a scheme without blocks."""


def quantize(graph: DecoderGraph, scheme: Scheme, block_size: int | None) -> Quantization:
    """Replace mixtures of experts, Linear nodes and the lookup of tokens. The last Linear of a decoder is its head.

    `block_size` None takes the scheme's own, and what the source has. Raises ExportError when a size is asked for, and
    matrices that keep the codes of their source have another.
    """
    size = block_size or scheme.block_size
    experts = {item.name: item.weight for item in expert_linears(graph)}
    for mixture in mixtures(graph):
        if scheme.mixture is not None:
            scheme.mixture(graph, mixture, block_size=size)
    for item in expert_linears(graph):  # those that the scheme has left
        del experts[item.name]
    expand_experts(graph)
    projections = linears(graph)
    head = projections[-1] if projections else None
    embeddings = _embeddings(graph)
    tied = {embedding.node: head is not None and head.weight is embedding.weight for embedding in embeddings}
    rounded = [linear.name for linear in projections if not linear.exact]
    names = dict.fromkeys([*rounded, *(str(embedding.weight.name) for embedding in embeddings)])
    weights = [*experts.values(), *(graph.weights[name] for name in names)]
    packed = [weight.packed for weight in weights if weight.packed is not None]
    kept = [one for one in packed if one.of_source]
    sizes = Counter(one.block_size for one in kept)
    if block_size is not None and sizes and set(sizes) != {block_size}:
        raise ExportError(
            f"--block-size {block_size} contradicts the source: it is quantized already, and its matrices keep their "
            f"codes, in blocks of {' and '.join(map(str, sorted(sizes)))}; leave the option out."
        )
    sizes += Counter(one.block_size for one in packed if not one.of_source)
    sizes[size] += len(weights) - len(packed)
    # Last first: what a Linear reads may be the output of another, which is replaced in its turn.
    for linear in reversed(projections):
        spell = FLOATING.linear if linear.exact else scheme.linear
        spell(graph, linear, is_head=linear is head, block_size=size)
    for embedding in embeddings:
        scheme.embedding(graph, embedding, tied=tied[embedding.node], block_size=size)
    graph.remove_unused()
    return Quantization(len(weights), len(kept), sizes.most_common(1)[0][0] or None if sizes else None)


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
