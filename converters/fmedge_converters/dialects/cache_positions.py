"""Where a step's tokens lie in static caches [B, K, C, D], and what they see of them.

`write_indices` [B] is the length of each row before the step. Every row gets the same number of tokens, so a token's
place follows from it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fmedge_converters.dialects.dialect import StepInput

WRITE_INDICES = StepInput("write_indices", torch.int64, ("batch",))


def places(step: Mapping[str, torch.Tensor], length: int) -> torch.Tensor:
    """The place [B, S] of each new token in its row."""
    first = step[WRITE_INDICES.name]  # [B]
    return first[:, None] + torch.arange(length)


def visible(step: Mapping[str, torch.Tensor], length: int, capacity: int, window: int | None) -> torch.Tensor:
    """Which places of the cache each new token sees [B, 1, S, C]: those up to its own, the last `window` of them."""
    queries = places(step, length)[:, None, :, None]  # [B, 1, S, 1]
    keys = torch.arange(capacity)[None, None, None, :]  # [1, 1, 1, C]
    seen = keys <= queries
    return seen if window is None else seen & (keys > queries - window)


def added_mask(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is added to the scores for that: nothing, or the lowest number."""
    return torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)
