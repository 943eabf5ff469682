"""Texts that only a broken model writes: loops, and the same for every prompt.

Small and untrained models repeat themselves, too. So what counts is what the source thinks of the way into a loop:
given the same tokens, by how much it would rather have written something else, in logits and so in nats.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

CYCLES = 4
SHORTEST = 16
"""A text loops if it ends with a cycle so many times, and with so many tokens of it at least."""
ENTRY = 2
"""Cycles that lead into a loop: seeing more of them, every model goes on with them."""
LARGEST_LEAD = 2.0
"""Nats, in the mean of those tokens, that the source may have preferred others by."""
LARGEST_SHARE = 1 / 4
"""Of continuations that may loop where the source would not: small models, decoded greedily, loop at a touch."""


@dataclass(frozen=True, slots=True)
class Loop:
    """A cycle of tokens that a text repeats to its end."""

    start: int
    period: int


def find_loop(tokens: Sequence[int]) -> Loop | None:
    """The shortest cycle that the text ends with, from where it begins; None if it does not loop."""
    ids = np.asarray(tokens)  # [T]
    for period in range(1, len(ids) // CYCLES + 1):
        differs = np.flatnonzero(ids[period:] != ids[:-period])
        start = int(differs[-1]) + 1 if len(differs) else 0
        if len(ids) - start >= max(CYCLES * period, SHORTEST):
            return Loop(start, period)
    return None


@dataclass(frozen=True, slots=True)
class Degeneration:
    """What some continuations have of it."""

    loops: int
    """Continuations that loop."""
    loops_alone: int
    """Those among them that the source would not have begun."""
    of: int
    """Continuations in all."""
    constant: bool
    """Whether different prompts have the same continuation, which the source would not have written."""

    @property
    def passed(self) -> bool:
        """Whether it is the source's own, but for a loop here and there."""
        return not self._loops and not self.constant

    @property
    def _loops(self) -> bool:
        return self.loops_alone > self.of * LARGEST_SHARE

    def reasons(self) -> Iterator[str]:
        """Why it did not pass, in words."""
        if self._loops:
            count = "continuation ends" if self.loops_alone == 1 else "continuations end"
            yield f"{self.loops_alone} {count} in a loop that the source would not have begun"
        if self.constant:
            yield "all prompts have one continuation, which the source would not have written"


def degeneration(continuations: Sequence[Sequence[int]], leads: Sequence[npt.NDArray[np.floating]]) -> Degeneration:
    """Judge continuations of different prompts; `leads` [T] are those of the source's choice over each token."""
    found = [find_loop(tokens) for tokens in continuations]
    alone = 0
    for loop, lead in zip(found, leads, strict=True):
        if loop is not None:
            alone += bool(lead[loop.start : loop.start + ENTRY * loop.period].mean() > LARGEST_LEAD)
    same = len(continuations) > 1 and len({tuple(tokens) for tokens in continuations}) == 1
    constant = same and bool(np.concatenate(leads).mean() > LARGEST_LEAD)
    return Degeneration(sum(loop is not None for loop in found), alone, len(found), constant)
