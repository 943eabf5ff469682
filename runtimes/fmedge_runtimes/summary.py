"""What a row of logits comes to: few numbers that a device computes beside them, from which most choices can be made.

The graph `candidates` of a bundle (docs/bundle.md) gives the largest logits, and the weights exp((logit - best) /
temperature) summed over runs of RUN tokens. `pick` chooses from these what `sampler.choose` chooses from the logits,
the same token by the same number - or says that it cannot: too few of the likeliest tokens are known, or the rounding
of the sums could decide. Then the logits themselves are fetched.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fmedge_runtimes.candidates import (
    LOWEST,
    divisor,
    keeps_all,
    locate,
    remaining,
)
from fmedge_runtimes.completion import TokenLogprob
from fmedge_runtimes.sampling import Sampling
from fmedge_runtimes.session import Array

RUN = 256
"""Tokens whose weights the graph gives as one sum."""

UNSURE = 4e-6
"""Sums are trusted to this part of the whole weight: another order, and another exp in float32, change less."""


@dataclass(frozen=True, slots=True)
class Summary:
    """One row of logits [V]."""

    ids: npt.NDArray[np.integer]
    """The tokens [K] of the largest logits; of those that tie with the smallest of them, maybe not all."""
    logits: npt.NDArray[np.float32]
    """Theirs [K], descending."""
    runs: npt.NDArray[np.float32]
    """Sums of weights [V / RUN], at the row's temperature."""
    total: float
    """The sum of exp(logit - largest) over the vocabulary: at temperature 1."""
    vocabulary: int
    part: Callable[[int, int], Array]
    """Fetches the logits of the tokens start:stop."""

    @property
    def floor(self) -> float:
        """Above this all logits are known; below all, if none is missing."""
        return float(self.logits[-1]) if len(self.ids) < self.vocabulary else -np.inf


@dataclass(frozen=True, slots=True)
class LogitsRow:
    """The logits of one row, wherever they are."""

    whole: Callable[[], npt.NDArray[np.floating]]
    """Fetches all of them [V]."""
    summary: Summary | None = None
    """What they come to, if they are on a device."""


def logprob_from(summary: Summary, token: int, top: int) -> TokenLogprob | None:
    """What `sampler.logprob_of` gives, to rounding; None if that cannot be told."""
    known = summary.logits > summary.floor
    (place,) = np.nonzero(summary.ids == token)
    if top > np.count_nonzero(known) or not len(place) or not np.isfinite(summary.total):
        return None
    whole = float(summary.logits[0]) + math.log(summary.total)
    order = np.lexsort((summary.ids[known], -summary.logits[known]))[:top]  # of a tie, the lowest id first
    likeliest = tuple((int(summary.ids[at]), float(summary.logits[at]) - whole) for at in order)
    return TokenLogprob(token, float(summary.logits[place[0]]) - whole, likeliest)


def pick(summary: Summary, sampling: Sampling, at: Callable[[], float]) -> int | None:
    """The next token for logits that no option edits, with the number `at` in [0, 1); None if that cannot be told."""
    best = summary.logits[0]
    # A NaN or an infinite logit anywhere makes a sum NaN.
    if not (np.isfinite(best) and np.isfinite(summary.runs).all()):
        return None
    if sampling.temperature == 0.0:
        return int(summary.ids[summary.logits == best].min()) if best > summary.floor else None
    if keeps_all(sampling, summary.vocabulary):
        return _of_all(summary, sampling, at())
    return _of_known(summary, sampling, at())


def _of_known(summary: Summary, sampling: Sampling, at: float) -> int | None:
    """A draw among the likeliest tokens."""
    known = summary.logits > summary.floor
    by_id = np.argsort(summary.ids[known])  # [N]
    ids, scores = summary.ids[known][by_id], summary.logits[known][by_id]  # [N]
    if not len(ids):
        return None
    if 0 < sampling.top_k < summary.vocabulary:
        if sampling.top_k > len(summary.ids):
            return None
        kth = max(summary.logits[sampling.top_k - 1], LOWEST)
        if kth <= summary.floor:
            return None
        ids, weights = remaining(ids[scores >= kth], scores[scores >= kth], 0.0, sampling)
        return int(ids[locate(weights, at)])
    if sampling.typical_p < 1.0:
        return None
    whole = float(summary.runs.sum(dtype=np.float64))
    weights = np.exp((scores - scores.max()).astype(np.float64) / divisor(sampling))  # [N]
    keep = np.ones(len(ids), np.bool_)
    if sampling.top_p < 1.0:
        order = np.argsort(-scores, kind="stable")  # of a tie, the lowest id first
        last = _sure(np.cumsum(weights[order]), sampling.top_p * whole, whole, "left")
        if last is None:
            return None
        keep[order[last + 1 :]] = False
    if sampling.min_p > 0.0:
        if sampling.top_p == 1.0:
            missing = np.exp((summary.floor - float(scores.max())) / divisor(sampling))
            if missing >= sampling.min_p * (1.0 - UNSURE):
                return None
        if (np.abs(weights - sampling.min_p) <= UNSURE * sampling.min_p).any():
            return None
        keep &= weights >= sampling.min_p
    held = np.cumsum(weights[keep])  # [M]
    found = _sure(held, at * held[-1], held[-1], "right")
    return None if found is None else int(ids[keep][found])


def _of_all(summary: Summary, sampling: Sampling, at: float) -> int | None:
    """A draw among all tokens: the run where the cumulated weight passes the number, then the token in it."""
    held = np.cumsum(summary.runs, dtype=np.float64)  # [V / RUN]
    whole = float(held[-1])
    run = _sure(held, at * whole, whole, "right")
    if run is None:
        return None
    start = run * RUN
    logits = summary.part(start, min(start + RUN, summary.vocabulary)).astype(np.float32)  # [RUN]
    weights = np.exp((logits - summary.logits[0]) / np.float32(divisor(sampling)))  # [RUN]
    before = float(held[run - 1]) if run else 0.0
    place = _sure(np.cumsum(weights, dtype=np.float64), at * whole - before, whole, "right")
    return None if place is None else start + place


def _sure(held: npt.NDArray[np.float64], target: float, whole: float, side: str) -> int | None:
    """Where cumulated weights [N] pass a target, if it is the same a little before and behind it."""
    margin = UNSURE * whole
    first = int(np.searchsorted(held, target - margin, side))  # type: ignore[call-overload]  # a literal, by its callers
    last = int(np.searchsorted(held, target + margin, side))  # type: ignore[call-overload]  # numpy wants a literal
    return first if first == last < len(held) else None
