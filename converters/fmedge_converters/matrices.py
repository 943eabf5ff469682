"""The matrices of a graph that are rounded in blocks, and what each may become."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fmedge_converters.graph import DecoderGraph
from fmedge_converters.mixed_precision import Matrix, Option
from fmedge_converters.passes.linear import linears
from fmedge_converters.rounding import Rounding
from fmedge_converters.schemes.scheme import Embedding, RoundsWeight
from fmedge_converters.weight import Weight


def matrices_of(graph: DecoderGraph, rounds: RoundsWeight, block_size: int) -> Iterator[Matrix]:
    """Each weight of a Linear once, then embeddings that have a matrix of their own. The first option is what the
    weight asks for, or the scheme; the last Linear of a decoder is its head."""
    projections = linears(graph)
    head = projections[-1].name if projections else None
    names = [linear.name for linear in projections if not linear.exact]
    lookups = [str(embedding.weight.name) for embedding in embeddings_of(graph)]
    for name in dict.fromkeys([*names, *lookups]):
        weight = graph.weights[name]
        usual = rounds(weight, is_head=name == head or name in lookups, block_size=block_size)
        yield Matrix(name, math.prod(weight.shape), _options(weight, usual))


def _options(weight: Weight, usual: Rounding) -> tuple[Option, ...]:
    rows, size = weight.shape
    packed = weight.packed
    if packed is not None:
        kept = Rounding(packed.bits, packed.block_size, symmetric=packed.zero_points is None)
        scale_bits = (packed.scale_dtype or weight.dtype).itemsize * 8
        return (Option(None, kept.stored_bits(rows, size, scale_bits), 0.0),)
    costs = {cost.rounding: cost.divergence for cost in weight.costs}
    roundings = [usual, *(rounding for rounding in costs if rounding != usual)] if costs else [usual]
    return tuple(
        Option(rounding, rounding.stored_bits(rows, size), costs.get(rounding, 0.0))
        for rounding in roundings
        if rounding in costs or not costs
    )


def embeddings_of(graph: DecoderGraph) -> list[Embedding]:
    """The lookups of tokens."""
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
