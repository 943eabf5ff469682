"""The best of several completions of one prompt, by log-probability.

candidates = BestOf(sampling)
for completion in finished:
    best = candidates.add(completion)     # empty until the last one is in
"""

from __future__ import annotations

import math
from dataclasses import replace

from fmedge_runtimes.completion import Completion
from fmedge_runtimes.sampling import Sampling


class BestOf:
    """The candidates of one request, until the best of them can be told."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._finished: list[Completion] = []

    def add(self, completion: Completion) -> list[Completion]:
        """The n best completions, best first and numbered so, once all best_of are in; before that, nothing.

        Completions that failed come after all others; of equals, the one with the lower index comes first.
        """
        self._finished.append(completion)
        if len(self._finished) < self._sampling.rows:
            return []
        ranked = sorted(self._finished, key=lambda one: (-self._score(one), one.index))
        return [replace(one, index=rank) for rank, one in enumerate(ranked[: self._sampling.n])]

    def _score(self, completion: Completion) -> float:
        if completion.error is not None or completion.cumulative_logprob is None:
            return -math.inf
        length = float(len(completion.tokens))
        return completion.cumulative_logprob / math.pow(length, self._sampling.length_penalty)
