"""A budget of bits, spent on a graph whose matrices' roundings have known costs, before anything is rounded."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from fmedge_converters.graph import DecoderGraph
from fmedge_converters.matrices import matrices_of
from fmedge_converters.mixed_precision import Allocation, Matrix, Option, allocate
from fmedge_converters.passes.mixture import expert_linears
from fmedge_converters.rounding import Rounding
from fmedge_converters.schemes.scheme import RoundsWeight, Scheme

SMALLEST_BLOCK = 16


def spend_bits(graph: DecoderGraph, scheme: Scheme, bits: float) -> Allocation:
    """Give each matrix the rounding that it is to have, so that all take at most `bits` bits per weight.

    Raises ExportError when the budget cannot be kept.
    """
    if scheme.rounding is None:
        raise RuntimeError(f"a budget of bits for {scheme.name}, which has no blocks")
    matrices = [*_experts(graph, scheme.rounding, scheme.block_size)]
    experts = len(matrices)
    matrices += matrices_of(graph, scheme.rounding, scheme.block_size)
    allocation = allocate(matrices, bits)
    for matrix, option in list(zip(allocation.matrices, allocation.chosen, strict=True))[experts:]:
        if option.rounding is not None:
            graph.weights[matrix.name] = dataclasses.replace(graph.weights[matrix.name], rounding=option.rounding)
    return allocation


def _experts(graph: DecoderGraph, rounds: RoundsWeight, block_size: int) -> Iterator[Matrix]:
    """Those that one tensor holds, as a kernel for them has them: nothing is chosen for these."""
    items = expert_linears(graph)
    block = math.gcd(block_size, *(item.weight.shape[2] for item in items))
    for item in items:
        experts, rows, size = item.weight.shape
        packed = item.weight.packed
        if packed is not None:
            rounding = Rounding(packed.bits, packed.block_size, symmetric=packed.zero_points is None)
        else:
            rounding = rounds(item.weight, is_head=False, block_size=block)
            if block < SMALLEST_BLOCK:
                rounding = dataclasses.replace(rounding, block_size=block_size)
        yield Matrix(
            item.name, math.prod(item.weight.shape), (Option(None, rounding.stored_bits(experts * rows, size), 0.0),)
        )
