"""Choose the next token of every row: penalties, temperature, truncation, draw.

The order is that of transformers' processors: repetition, presence and frequency penalties, temperature, top-k, top-p,
min-p. A draw takes one uniform number from a counter-based generator keyed by (seed, completion index) at the
position, and inverts the cumulative distribution in the order of token ids. So it depends on its own row alone.
Generator: Philox, https://www.thesalmons.org/john/random123/papers/random123sc11.pdf
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fmedge_runtimes.sampling import Sampling

REFUSED = -1
"""Chosen for a row whose logits are not finite."""


def fresh_seed() -> int:
    """A seed from the operating system's entropy."""
    return secrets.randbits(63)


class RowState:
    """What choosing remembers of one sequence: the tokens that penalties count, and the position."""

    def __init__(self, sampling: Sampling, seed: int, index: int, prompt: Sequence[int], vocabulary: int) -> None:
        self.sampling = sampling
        self.key = np.array([seed, index], np.uint64)
        self.position = 0
        self.seen: npt.NDArray[np.bool_] | None = None  # [V], in prompt or completion
        self.counts: npt.NDArray[np.int32] | None = None  # [V], in the completion
        if sampling.repetition_penalty != 1.0:
            self.seen = np.zeros(vocabulary, np.bool_)
            self.seen[np.asarray(prompt, np.int64)] = True
        if sampling.presence_penalty or sampling.frequency_penalty:
            self.counts = np.zeros(vocabulary, np.int32)

    @property
    def plain_greedy(self) -> bool:
        """Whether the choice is the largest logit as it is."""
        return self.sampling.temperature == 0.0 and self.seen is None and self.counts is None

    def record(self, token: int) -> None:
        """Note the token that the sequence continues with."""
        self.position += 1
        if self.seen is not None:
            self.seen[token] = True
        if self.counts is not None:
            self.counts[token] += 1

    def uniform(self) -> float:
        """The number in [0, 1) that decides at this position."""
        return float(np.random.Generator(np.random.Philox(key=self.key, counter=self.position)).random())


def choose(logits: npt.NDArray[np.floating], rows: Sequence[RowState]) -> npt.NDArray[np.int64]:
    """The next token [R] for logits [R, V]; REFUSED where a row's logits hold NaN or no finite number."""
    best = logits.argmax(-1)  # [R]; a NaN is its row's largest
    peaks = logits[np.arange(len(rows)), best]  # [R]
    chosen = np.where(np.isfinite(peaks), best, REFUSED).astype(np.int64)
    for number, row in enumerate(rows):
        if chosen[number] != REFUSED and not row.plain_greedy:
            chosen[number] = _choose_one(logits[number].astype(np.float32), row)
    return chosen


def _choose_one(logits: npt.NDArray[np.float32], row: RowState) -> int:
    sampling = row.sampling
    penalize(logits, row)
    if sampling.temperature == 0.0:
        return int(logits.argmax())
    candidates, probabilities = distribution(logits, sampling)
    cumulative = probabilities.cumsum()
    # The sum may miss 1 by rounding; the draw scales with it, so no token falls off the end.
    position = int(np.searchsorted(cumulative, row.uniform() * cumulative[-1], side="right"))
    return int(candidates[min(position, len(candidates) - 1)])


def penalize(logits: npt.NDArray[np.float32], row: RowState) -> None:
    """Apply the penalties to logits [V] in place.

    Repetition: CTRL, https://arxiv.org/abs/1909.05858. Presence and frequency: as OpenAI defines them.
    """
    sampling = row.sampling
    if row.seen is not None:
        seen = logits[row.seen]
        penalty = np.float32(sampling.repetition_penalty)
        logits[row.seen] = np.where(seen < 0, seen * penalty, seen / penalty)
    if row.counts is not None:
        present = row.counts > 0
        logits[present] -= np.float32(sampling.presence_penalty)
        logits[present] -= np.float32(sampling.frequency_penalty) * row.counts[present]


def distribution(
    logits: npt.NDArray[np.float32], sampling: Sampling
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The tokens [C] that may be drawn, in ascending order, and their probabilities [C]; temperature is above 0.

    Top-p: nucleus sampling, https://arxiv.org/abs/1904.09751. Min-p: https://arxiv.org/abs/2407.01082.
    """
    scaled = logits.astype(np.float64) / sampling.temperature  # [V]
    candidates = np.arange(len(scaled))  # [C]
    if 0 < sampling.top_k < len(scaled):
        # Everything level with the k-th largest stays, as in transformers.
        floor = np.partition(scaled, -sampling.top_k)[-sampling.top_k]
        candidates = np.flatnonzero(scaled >= floor)
    else:
        candidates = np.flatnonzero(scaled > -np.inf)
    probabilities = _softmax(scaled[candidates])  # [C]
    if sampling.top_p < 1.0:
        # From the least likely on: what sums to no more than 1 - p goes, but the most likely token stays.
        order = np.argsort(probabilities, kind="stable")
        dropped = probabilities[order].cumsum() <= 1.0 - sampling.top_p
        dropped[-1] = False
        keep = np.sort(order[~dropped])
        candidates, probabilities = candidates[keep], _softmax(scaled[candidates[keep]])
    if sampling.min_p > 0.0:
        likely = probabilities >= sampling.min_p * probabilities.max()
        candidates, probabilities = candidates[likely], _softmax(scaled[candidates[likely]])
    return candidates, probabilities


def _softmax(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    weights = np.exp(values - values.max())
    result: npt.NDArray[np.float64] = weights / weights.sum()
    return result
