"""How likely a decoder finds a text, and how far its distributions are from another's: sums over positions.

sums = Sums()
sums.add(logits, following, others)     # [P, V], [P], [P, V]
sums.perplexity, sums.mean_kl
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.floating]

POSITIONS = 32
"""Distributions that are looked at together: each takes megabytes for a large vocabulary."""
BEST = 5
"""Among how many of the likeliest tokens the other decoder's best one is looked for."""
LARGEST_NATS = 700.0
"""Beyond it a perplexity is more than a float holds."""


@dataclass(slots=True)
class Sums:
    """Sums over the positions of a text. Divergences are of the other decoder's distribution from this one's."""

    scored: int = 0
    """Positions whose following token is known."""
    nats: float = 0.0
    """Of those tokens: the negative logarithms of their probabilities."""
    compared: int = 0
    """Positions where another decoder's distribution was given."""
    other_nats: float = 0.0
    """Of the scored tokens by the other decoder."""
    kl: float = 0.0
    same_best: int = 0
    other_best_among: int = 0
    """Positions where the other's best token is one of the BEST likeliest."""
    not_finite: int = 0
    """Positions with a logit that is NaN or plus infinity."""

    def add(self, logits: Logits, following: Sequence[int], others: Logits | None = None) -> None:
        """Positions with logits [P, V]; the tokens [<= P] that follow them, as far as they are known; the other's."""
        for start in range(0, len(logits), POSITIONS):
            part = slice(start, start + POSITIONS)
            self._add(logits[part], following[part], None if others is None else others[part])

    def _add(self, logits: Logits, following: Sequence[int], others: Logits | None) -> None:
        self.not_finite += int((~(logits < np.inf)).any(-1).sum())
        ours = log_softmax(logits)  # [P, V]
        known = np.arange(len(following)), np.asarray(following, np.int64)
        self.scored += len(following)
        self.nats -= float(ours[known].sum())
        if others is None:
            return
        theirs = log_softmax(others)  # [P, V]
        self.compared += len(logits)
        self.other_nats -= float(theirs[known].sum())
        with np.errstate(invalid="ignore"):  # a token that the other finds impossible: 0 * (-inf), which counts nothing
            terms = np.exp(theirs) * (theirs - ours)  # [P, V]
        self.kl += float(np.where(theirs == -np.inf, 0.0, terms).sum())
        best = theirs.argmax(-1, keepdims=True)  # [P, 1]
        ahead = (ours > np.take_along_axis(ours, best, -1)).sum(-1)  # [P]: tokens that are likelier than it
        self.same_best += int((ours.argmax(-1) == best[:, 0]).sum())
        self.other_best_among += int((ahead < BEST).sum())

    def __add__(self, other: Sums) -> Sums:
        """Both together."""
        return Sums(*(getattr(self, name) + getattr(other, name) for name in Sums.__slots__))

    @property
    def perplexity(self) -> float:
        """Of the scored tokens."""
        return _perplexity(self.nats, self.scored)

    @property
    def other_perplexity(self) -> float:
        """Of the scored tokens by the other decoder."""
        return _perplexity(self.other_nats, self.scored)

    @property
    def mean_kl(self) -> float:
        """Mean KL divergence in nats per position."""
        return self.kl / self.compared

    @property
    def top1_agreement(self) -> float:
        """The share of positions where both have the same best token."""
        return self.same_best / self.compared

    @property
    def top5_agreement(self) -> float:
        """The share of positions where the other's best token is among the five likeliest here."""
        return self.other_best_among / self.compared


def _perplexity(nats: float, tokens: int) -> float:
    mean = nats / tokens
    return math.exp(mean) if mean < LARGEST_NATS else math.nan if math.isnan(mean) else math.inf


def log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
    """The logarithms of the probabilities [P, V] of logits [P, V]."""
    with np.errstate(invalid="ignore"):  # infinite logits give NaN, which callers find
        shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)  # [P, V]
        result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
