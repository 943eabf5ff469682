"""Speculative decoding without a second model: a text that repeats itself probably goes on as it did before.

The tokens behind the last place where a sequence said the same are a draft of what comes; one step of the graph checks
all of them. A token is kept only if it is the one that would have been chosen anyway, by the same draw, so the text is
the one without drafts. (Prompt lookup decoding, Saxena 2023.)
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

NGRAM = 3
"""Tokens that must be the same before a draft is made."""
SHORTEST, LONGEST = 3, 10
"""Tokens of a draft: each one costs a part of a step, between a twentieth and a fifth of one on a CPU."""
LONGEST_PAUSE = 64
"""Tokens without a draft, after many that were wrong."""


class PromptLookup:
    """The drafts of one sequence: longer ones after good ones, none for a while after bad ones."""

    __slots__ = ("_length", "_next_pause", "_pause", "accepted", "drafted")

    def __init__(self) -> None:
        self._length = SHORTEST
        self._pause = 0
        self._next_pause = 1
        self.drafted = 0
        """Tokens of all drafts."""
        self.accepted = 0
        """Those of them that were kept."""

    def draft(self, tokens: npt.NDArray[np.int32], most: int) -> npt.NDArray[np.int32]:
        """What may come after `tokens` [S]: `most` tokens at most, often none."""
        if self._pause > 0:
            self._pause -= 1
            return tokens[:0]
        length = min(self._length, most)
        if length < 1 or len(tokens) <= NGRAM:
            return tokens[:0]
        same = np.ones(len(tokens) - NGRAM, np.bool_)  # [S - NGRAM]: whether the tokens from here on are the last ones
        for place in range(NGRAM):
            same &= tokens[place : place - NGRAM] == tokens[place - NGRAM]
        places = np.flatnonzero(same) + NGRAM
        if not len(places):
            return tokens[:0]
        # The last place that a whole draft follows; in a text that turns in circles that is not the last one.
        whole = places[places + length <= len(tokens)]
        start = whole[-1] if len(whole) else places[0]
        return tokens[start : start + length]

    def learn(self, drafted: int, accepted: int) -> None:
        """Take note of what became of a draft, for the next one."""
        if not drafted:
            return
        if 2 * accepted >= drafted:
            self._next_pause = 1
            self._length = min(LONGEST, self._length + accepted)
        else:
            self._pause = self._next_pause
            self._next_pause = min(LONGEST_PAUSE, 2 * self._next_pause)
            self._length = SHORTEST
