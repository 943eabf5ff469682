"""The matrices of a graph that are rounded in blocks, and what each may become."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

from fmedge_converters.graph import DecoderGraph
from fmedge_converters.mixed_precision import Matrix, Option
from fmedge_converters.passes.linear import heads, linears
from fmedge_converters.passes.lookup import lookups
from fmedge_converters.rounding import Rounding
from fmedge_converters.schemes.scheme import Scheme
from fmedge_converters.weight import Weight


def matrices_of(graph: DecoderGraph, scheme: Scheme, block_size: int) -> Iterator[Matrix]:
    """Each weight of a Linear once, then embeddings that have a matrix of their own. The first option is what the
    weight asks for, or the scheme."""
    if scheme.rounding is None:
        raise RuntimeError(f"matrices in blocks for {scheme.name}, which has none")
    names = [linear.name for linear in linears(graph) if not linear.exact]
    looked_up = list(dict.fromkeys(str(lookup.weight.name) for lookup in lookups(graph)))
    wide = {*(head.name for head in heads(graph)), *looked_up}
    for name in dict.fromkeys([*names, *(looked_up if scheme.lookup_bits is None else ())]):
        rounds = functools.partial(scheme.rounding, is_head=name in wide, block_size=block_size)
        yield matrix_of(name, graph.weights[name], rounds)
    if scheme.lookup_bits is not None:
        for name in looked_up:
            numbers = math.prod(graph.weights[name].shape)
            # The numbers of one that the head has, too, are counted there.
            yield Matrix(name, 0 if name in names else numbers, (Option(None, numbers * scheme.lookup_bits, 0.0),))


def matrix_of(name: str, weight: Weight, rounds: Callable[[Weight], Rounding]) -> Matrix:
    """A matrix [N, K], and what it may become: what a scheme rounds it to unless something else is chosen, then the
    rest of what has known costs, but for what the scheme rounds otherwise, as it cannot express it."""
    options = [
        option
        for option in _options(weight, rounds(weight))
        if option.rounding is None or rounds(dataclasses.replace(weight, rounding=option.rounding)) == option.rounding
    ]
    return Matrix(name, math.prod(weight.shape), tuple(options))


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
