"""The matrices of a graph that are rounded in blocks, and what each may become."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fmedge_converters.graph import DecoderGraph
from fmedge_converters.mixed_precision import Matrix, Option
from fmedge_converters.passes.linear import heads, linears
from fmedge_converters.passes.lookup import lookups
from fmedge_converters.rounding import Rounding
from fmedge_converters.schemes.scheme import RoundsWeight
from fmedge_converters.weight import Weight


def matrices_of(graph: DecoderGraph, rounds: RoundsWeight, block_size: int) -> Iterator[Matrix]:
    """Each weight of a Linear once, then embeddings that have a matrix of their own. The first option is what the
    weight asks for, or the scheme."""
    names = [linear.name for linear in linears(graph) if not linear.exact]
    wide = {*(head.name for head in heads(graph)), *(str(lookup.weight.name) for lookup in lookups(graph))}
    for name in dict.fromkeys([*names, *(str(lookup.weight.name) for lookup in lookups(graph))]):
        weight = graph.weights[name]
        yield matrix_of(name, weight, rounds(weight, is_head=name in wide, block_size=block_size))


def matrix_of(name: str, weight: Weight, usual: Rounding) -> Matrix:
    """A matrix [N, K] that is rounded as `usual` unless something else is chosen for it."""
    return Matrix(name, math.prod(weight.shape), _options(weight, usual))


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
