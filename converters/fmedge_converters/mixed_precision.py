"""Which matrix gets how many bits: the allocation that costs least within a budget.

A multiple-choice knapsack, solved by dynamic programming over the bits that are left when every matrix has its smallest
form (Kellerer, Pferschy and Pisinger, "Knapsack problems", 2004, chapter 11). Sizes are rounded up to a fine unit, so
the budget is kept, and what is chosen is the best but for that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from fmedge_runtimes.errors import ExportError

from fmedge_converters.rounding import Rounding

UNITS = 1 << 16
"""In which the budget is counted."""


def candidates(*, symmetric: bool) -> tuple[Rounding, ...]:
    """What a matrix may become. 2 bits are not among them: what they save costs more than it would elsewhere."""
    four = [Rounding(4, block, symmetric) for block in (256, 128, 64, 32)]
    return (*four, Rounding(8, 128, symmetric))


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix of a graph, or the matrices of a mixture of experts, and what it may become."""

    name: str
    numbers: int
    """Weights in it."""
    options: tuple[Option, ...]
    """At least one, the scheme's own first; one for what cannot be chosen."""


@dataclass(frozen=True, slots=True)
class Option:
    """A form of a matrix."""

    rounding: Rounding | None
    """None leaves it to the scheme, or to the codes of the source."""
    bits: int
    """In the file."""
    cost: float
    """KL divergence, in nats per token; 0 where it was not measured."""


@dataclass(frozen=True, slots=True)
class Allocation:
    """An option for each matrix."""

    matrices: tuple[Matrix, ...]
    chosen: tuple[Option, ...]

    @property
    def bits_per_weight(self) -> float:
        """Of all matrices together, scales and zero points included."""
        return sum(option.bits for option in self.chosen) / max(1, sum(matrix.numbers for matrix in self.matrices))

    @property
    def cost(self) -> float:
        """Estimated KL divergence, in nats per token."""
        return sum(option.cost for option in self.chosen)

    @property
    def usual(self) -> Allocation:
        """What the scheme does without a budget."""
        return Allocation(self.matrices, tuple(matrix.options[0] for matrix in self.matrices))


def allocate(matrices: Sequence[Matrix], bits: float) -> Allocation:
    """The cheapest allocation with at most `bits` bits per weight.

    Raises ExportError when there is none, when every one has less, and when there is nothing to choose.
    """
    numbers = sum(matrix.numbers for matrix in matrices)
    least = sum(min(option.bits for option in matrix.options) for matrix in matrices)
    most = sum(max(option.bits for option in matrix.options) for matrix in matrices)
    if least == most:
        raise ExportError(
            f"--bits {bits:g} has nothing to choose: every matrix keeps the codes of the source, or is one that is not "
            "measured (experts in one tensor); leave the option out."
        )
    budget = math.floor(bits * numbers)
    if budget < least:
        raise ExportError(
            f"--bits {bits:g} is too little: the smallest forms of this model's matrices take "
            f"{_rounded_up(least / numbers)} bits per weight, with scales; give that or more."
        )
    if budget > most:
        raise ExportError(
            f"--bits {bits:g} is too much: the largest forms of this model's matrices take "
            f"{math.floor(most / numbers * 1000) / 1000:.3f} bits per weight, with scales; give that or less."
        )
    return Allocation(tuple(matrices), tuple(_cheapest(matrices, budget - least)))


def _rounded_up(bits: float) -> str:
    return f"{math.ceil(bits * 1000) / 1000:.3f}"


def _cheapest(matrices: Sequence[Matrix], slack: int) -> list[Option]:
    """An option for each matrix, with `slack` bits more in all than their smallest ones have."""
    unit = max(1, -(-slack // UNITS))
    room = slack // unit
    best = np.zeros(room + 1)  # by units, the lowest cost with at most so many
    picks = np.empty((len(matrices), room + 1), np.uint8)
    for row, matrix in enumerate(matrices):
        smallest = min(option.bits for option in matrix.options)
        after = np.full(room + 1, np.inf)
        # Small ones first: of equal costs the smallest is taken.
        for index in _by_size(matrix):
            option = matrix.options[index]
            extra = -(-(option.bits - smallest) // unit)
            if extra > room:
                break
            cost = best[: room + 1 - extra] + option.cost
            better = cost < after[extra:]
            after[extra:][better] = cost[better]
            picks[row, extra:][better] = index
        best = after
    chosen = []
    for row in reversed(range(len(matrices))):
        option = matrices[row].options[picks[row, room]]
        smallest = min(other.bits for other in matrices[row].options)
        room -= -(-(option.bits - smallest) // unit)
        chosen.append(option)
    return chosen[::-1]


def _by_size(matrix: Matrix) -> list[int]:
    return sorted(range(len(matrix.options)), key=lambda index: matrix.options[index].bits)
