"""A budget of bits, spent on a graph whose matrices' roundings have known costs, before anything is rounded."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from fmedge_converters.graph import DecoderGraph
from fmedge_converters.matrices import matrices_of, matrix_of
from fmedge_converters.mixed_precision import Allocation, Matrix, Option, allocate
from fmedge_converters.passes.divided_head import can_be_divided, divide_head
from fmedge_converters.passes.linear import Linear, heads
from fmedge_converters.passes.mixture import expert_linears
from fmedge_converters.rounding import Rounding
from fmedge_converters.schemes.scheme import RoundsWeight, Scheme
from fmedge_converters.weight import rows_of

SMALLEST_BLOCK = 16
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Of the rows of a head, where ranges that may be rounded differently begin."""
STEP = 64
"""Ranges begin at multiples of it."""


def spend_bits(graph: DecoderGraph, scheme: Scheme, bits: float) -> Allocation:
    """Give each matrix the rounding that it is to have, so that all take at most `bits` bits per weight, and divide the
    head where ranges of its rows get different ones.

    Raises ExportError when the budget cannot be kept.
    """
    if scheme.rounding is None:
        raise RuntimeError(f"a budget of bits for {scheme.name}, which has no blocks")
    rounds, size = scheme.rounding, scheme.block_size
    matrices = [*_experts(graph, rounds, size), *matrices_of(graph, scheme, size)]
    head = _divisible_head(graph) if scheme.lookup_bits is None else None
    if head is None:
        allocation = allocate(matrices, bits)
    else:
        weight = graph.weights[head.name]
        as_head = functools.partial(rounds, is_head=True, block_size=size)
        parts = [(rows, matrix_of(head.name, rows_of(weight, *rows), as_head)) for rows in _ranges(weight.rows)]
        others = [matrix for matrix in matrices if matrix.name != head.name]
        found = allocate([*others, *(part for _, part in parts)], bits)
        allocation = _give_head(graph, head, found, [rows for rows, _ in parts])
    for matrix, option in zip(allocation.matrices, allocation.chosen, strict=True):
        if option.rounding is not None:
            graph.weights[matrix.name] = dataclasses.replace(graph.weights[matrix.name], rounding=option.rounding)
    return allocation


def _divisible_head(graph: DecoderGraph) -> Linear | None:
    """A head whose roundings have costs for each row."""
    for head in heads(graph):
        costs = graph.weights[head.name].costs
        if costs and all(cost.rows is not None for cost in costs) and can_be_divided(graph, head):
            return head
    return None


def _ranges(rows: int) -> list[tuple[int, int]]:
    """Neighbouring rows of a head that get one rounding. Vocabularies of pairs of bytes begin with what is frequent."""
    starts = [int(rows * share) // STEP * STEP for share in SHARES]
    return [(start, stop) for start, stop in pairwise((0, *starts, rows)) if start < stop]


def _give_head(graph: DecoderGraph, head: Linear, found: Allocation, ranges: Sequence[tuple[int, int]]) -> Allocation:
    """Divide the head as the last choices say, one for each range, and join those that are alike."""
    count = len(found.matrices) - len(ranges)
    groups: list[list[int]] = []
    for index in range(count, len(found.matrices)):
        if groups and found.chosen[groups[-1][0]].rounding == found.chosen[index].rounding:
            groups[-1].append(index)
        else:
            groups.append([index])
    starts = [ranges[group[0] - count][0] for group in groups[1:]]
    names = [head.name]
    if starts:
        names = divide_head(graph, head, starts)
    joined = [
        _joined(name, [found.matrices[index] for index in group]) for name, group in zip(names, groups, strict=True)
    ]
    chosen = [
        matrix.options[found.matrices[group[0]].options.index(found.chosen[group[0]])]
        for matrix, group in zip(joined, groups, strict=True)
    ]
    return Allocation((*found.matrices[:count], *joined), (*found.chosen[:count], *chosen))


def _joined(name: str, parts: Sequence[Matrix]) -> Matrix:
    """Matrices with the same roundings, as one."""
    options = tuple(
        Option(same[0].rounding, sum(option.bits for option in same), sum(option.cost for option in same))
        for same in zip(*(part.options for part in parts), strict=True)
    )
    return Matrix(name, sum(part.numbers for part in parts), options)


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
