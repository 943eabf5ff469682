"""How far two forms of a decoder are apart: KL divergence, agreement and perplexity over pieces of text."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from fmedge_runtimes.decoder import Decoder
from fmedge_runtimes.likelihood import Sums

from fmedge_converters.reference import Logits


def pieces_of(text: Sequence[int], window: int) -> list[list[int]]:
    """A text in pieces of `window` tokens; a last one of a single token predicts nothing and is left out."""
    pieces = [list(text[start : start + window]) for start in range(0, len(text), window)]
    return [piece for piece in pieces if len(piece) > 1]


class Divergence:
    """How far a decoder's distributions are from those of its reference, over pieces of text."""

    def __init__(self, decoder: Decoder, prompts: Sequence[Sequence[int]], pieces: Sequence[Sequence[int]]) -> None:
        self.pieces = pieces
        self._decoder = decoder
        self._cache = decoder.new_cache()
        self._prompts = prompts
        self._sums = Sums()
        self._largest_difference = 0.0

    def add_piece(self, number: int, logits: Logits) -> None:
        """Compare a piece, given the reference's logits [S, V]."""
        piece = self.pieces[number]
        self._sums.add(self._decoder.score(self._cache, piece), piece[1:], logits)

    def add_prompt(self, number: int, logits: Logits) -> None:
        """Compare the last logits of a prompt, given the reference's logits [S, V] of a row that begins with it."""
        prompt = self._prompts[number]
        mine = self._decoder.prefill(self._cache, 0, prompt)  # [V]
        self._cache.clear()
        difference = float(np.abs(mine - logits[len(prompt) - 1]).max())
        self._largest_difference = max(self._largest_difference, difference)

    @property
    def tokens(self) -> int:
        """Tokens of the pieces compared so far."""
        return self._sums.compared

    @property
    def not_finite(self) -> int:
        """Positions of the text where the decoder gives logits that are not finite."""
        return self._sums.not_finite

    @property
    def mean_kl(self) -> float:
        """Mean KL divergence of the reference's distribution from ours, in nats per token."""
        return _finite(self._sums.mean_kl)

    @property
    def top1_agreement(self) -> float:
        """How often both have the same best token."""
        return self._sums.top1_agreement

    @property
    def perplexity(self) -> float:
        """Of the decoder."""
        return _finite(self._sums.perplexity)

    @property
    def source_perplexity(self) -> float:
        """Of the reference."""
        return _finite(self._sums.other_perplexity)

    def figures(self) -> dict[str, float | int | str | bool]:
        """What was found, as evidence has it."""
        return {
            "text_tokens": self.tokens,
            "mean_kl": self.mean_kl,
            "top1_agreement": self.top1_agreement,
            "perplexity": self.perplexity,
            "source_perplexity": self.source_perplexity,
            "prompt_logit_difference": _finite(self._largest_difference),
        }


def _finite(value: float) -> float:
    """JSON has no infinity; a non-finite figure is far beyond every tolerance either way."""
    return value if math.isfinite(value) else 1e30
