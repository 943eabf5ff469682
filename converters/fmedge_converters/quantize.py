"""Spell every weight of a graph by a scheme: the experts, the linears, the head, the token embedding."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fmedge_runtimes.errors import ExportError

from fmedge_converters.graph import DecoderGraph
from fmedge_converters.matrices import matrices_of
from fmedge_converters.mixed_precision import Allocation, Matrix, Option
from fmedge_converters.passes.experts import expand_experts
from fmedge_converters.passes.linear import heads, linears
from fmedge_converters.passes.lookup import lookups
from fmedge_converters.passes.mixture import expert_linears, mixtures
from fmedge_converters.schemes.floating import FLOATING
from fmedge_converters.schemes.scheme import Scheme
from fmedge_converters.weight import Weight


@dataclass(frozen=True, slots=True)
class Quantization:
    """What became of a graph's matrices. Those of all experts count as one where one operator has them."""

    matrices: int
    kept: int
    """Those that have the codes of their source."""
    block_size: int | None
    """Weights that share a scale, in most of them; None for a scheme without blocks."""
    bits_per_weight: float | None
    """In the file, scales and zero points included; None for a scheme without blocks."""


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
    of_head = {head.node for head in heads(graph)}
    embeddings = lookups(graph)
    tied = {embedding.node: any(use.node in of_head for use in embedding.weight.uses()) for embedding in embeddings}
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
    bits_per_weight: float | None = None
    if scheme.rounding is not None:
        found = [*_kernels(graph, list(experts.values())), *matrices_of(graph, scheme, size)]
        chosen = tuple(one.options[0] for one in found)
        bits_per_weight = Allocation(tuple(found), chosen).bits_per_weight
        sizes += Counter(option.rounding.block_size for option in chosen if option.rounding is not None)
    sizes[size] += len(weights) - sizes.total()
    # Last first: what a Linear reads may be the output of another, which is replaced in its turn.
    for linear in reversed(projections):
        spell = FLOATING.linear if linear.exact else scheme.linear
        spell(graph, linear, is_head=linear.node in of_head, block_size=size)
    for embedding in embeddings:
        scheme.embedding(graph, embedding, tied=tied[embedding.node], block_size=size)
    graph.remove_unused()
    return Quantization(len(weights), len(kept), sizes.most_common(1)[0][0] or None if sizes else None, bits_per_weight)


def _kernels(graph: DecoderGraph, experts: Sequence[Weight]) -> Iterator[Matrix]:
    """The experts that kernels have, all as one; their codes, scales and zero points are the inputs of rank 3."""
    inputs = [graph.weight(value) for node in graph.graph if node.op_type == "QMoE" for value in node.inputs]
    size = sum(weight.nbytes for weight in inputs if weight is not None and len(weight.shape) == 3)
    if size:
        yield Matrix("experts", sum(math.prod(weight.shape) for weight in experts), (Option(None, size * 8, 0.0),))
