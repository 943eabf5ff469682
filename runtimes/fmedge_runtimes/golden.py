"""Greedy continuations: how they are made at export, and replayed to see that a machine computes what it should."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fmedge_runtimes.decoder import Decoder
from fmedge_runtimes.manifest import Golden, GoldenStep
from fmedge_runtimes.row_cache import RowCache


@dataclass(frozen=True, slots=True)
class Replay:
    """What became of one golden continuation."""

    tokens: int
    """Tokens compared."""
    mismatch: int | None
    """The first step whose token differs though its lead was clear; None if all agree."""
    near_ties: int
    """Steps that fell the other way where the two best tokens were level."""
    found: int | None
    """The token found at the mismatch."""


def continue_greedily(
    decoder: Decoder, prompts: Sequence[Sequence[int]], lengths: Sequence[int]
) -> list[list[GoldenStep]]:
    """Continue prompts in one ragged batch, prompt i by lengths[i] tokens; rows leave as they finish."""
    cache = decoder.new_cache()
    cache.reserve(len(prompts), max(map(len, prompts)) + 1)
    steps: list[list[GoldenStep]] = [[] for _ in prompts]
    live: list[int] = []
    for index, prompt in enumerate(prompts):
        steps[index].append(_best(decoder.prefill(cache, len(live), prompt)))
        live.append(index)
    while live:
        for row in range(len(live) - 1, -1, -1):
            if len(steps[live[row]]) >= lengths[live[row]]:
                _leave(cache, live, row)
        if live:
            logits = decoder.decode(cache, [steps[index][-1].token for index in live])
            for row, index in enumerate(live):
                steps[index].append(_best(logits[row]))
    return steps


def _leave(cache: RowCache, live: list[int], row: int) -> None:
    """The last row takes the place of one that is through."""
    last = len(live) - 1
    if row != last:
        cache.copy(last, row, int(cache.lengths[last]))
    cache.cut(last, 0)
    live[row] = live[last]
    live.pop()


def _best(logits: npt.NDArray[np.floating]) -> GoldenStep:
    token = int(logits.argmax())
    second = np.partition(logits, -2)[-2]
    return GoldenStep(token=token, margin=float(logits[token]) - float(second))


def replay(decoder: Decoder, goldens: Sequence[Golden]) -> list[Replay]:
    """Run the golden continuations in one batch, each step on the golden tokens before it, and compare."""
    cache = decoder.new_cache()
    cache.reserve(len(goldens), max(len(golden.prompt) + len(golden.steps) for golden in goldens))
    found = [[int(decoder.prefill(cache, row, golden.prompt).argmax())] for row, golden in enumerate(goldens)]
    live = list(range(len(goldens)))
    while live:
        for row in range(len(live) - 1, -1, -1):
            # A row leaves when it is through: its context may be full.
            if len(found[live[row]]) >= len(goldens[live[row]].steps):
                _leave(cache, live, row)
        if live:
            logits = decoder.decode(cache, [goldens[index].steps[len(found[index]) - 1].token for index in live])
            for row, index in enumerate(live):
                found[index].append(int(logits[row].argmax()))
    return [_compare(golden, tokens) for golden, tokens in zip(goldens, found, strict=True)]


def _compare(golden: Golden, tokens: Sequence[int]) -> Replay:
    near_ties = 0
    for index, (step, token) in enumerate(zip(golden.steps, tokens[: len(golden.steps)], strict=True)):
        if step.token == token:
            continue
        if step.margin >= golden.near_tie:
            return Replay(len(golden.steps), index, near_ties, token)
        near_ties += 1
    return Replay(len(golden.steps), None, near_ties, None)
