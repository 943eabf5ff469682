"""The masks of a model, made from the positions of a ragged batch over caches that are as long as their buffers.

transformers describes a mask by a function of two positions and lets an interface turn it into a tensor. Ours does,
for every model; where the function is causal, or causal within a window, it also says so, and the attention operator
makes the mask itself: the tensor then has no use, and disappears.
"""

from __future__ import annotations

from typing import Any

import torch
from fmedge_runtimes.errors import SourceError
from torch._subclasses.fake_tensor import unset_fake_temporarily

from fmedge_converters.recording import Mask, MaskFunction, active

PROBES = (0, 1, 2, 3, 7, 8, 15, 16, 31, 63, 64, 127, 255, 300, 1023, 2048, 4096, 5000, 9000, 20000)
"""Positions of queries at which a mask's function is looked at."""


def make_mask(mask_function: MaskFunction, dtype: torch.dtype, **_others: Any) -> torch.Tensor:  # noqa: ANN401 - transformers' signature
    """The mask [B, 1, S, C] that is added to the scores. Called by transformers' mask interface."""
    recording = active()
    batch, length = recording.positions.shape
    capacity = recording.capacity
    device = recording.positions.device
    rows = torch.arange(batch, device=device)[:, None, None, None]  # [B, 1, 1, 1]
    heads = torch.zeros((1, 1, 1, 1), dtype=torch.int64, device=device)
    queries = recording.positions[:, None, :, None]  # [B, 1, S, 1]
    keys = torch.arange(capacity, device=device)[None, None, None, :]  # [1, 1, 1, C]
    seen = mask_function(rows, heads, queries, keys).expand(batch, 1, length, capacity)
    tensor = torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)
    plain, window = _meaning(mask_function) if recording.probing else (False, None)
    recording.masks.append(Mask(tensor, plain, window))
    return tensor


def _meaning(mask_function: MaskFunction) -> tuple[bool, int | None]:
    """Whether a mask is causal but for a window, and the window, found by asking it about many positions.

    Raises SourceError when it lets a token see later ones.
    """
    try:
        with unset_fake_temporarily():
            zero = torch.zeros((), dtype=torch.int64)
            queries = torch.tensor(PROBES)[:, None]  # [N, 1]
            keys = torch.arange(max(PROBES) + 2)[None]  # [1, M]
            seen = mask_function(zero, zero, queries, keys).expand(len(PROBES), keys.shape[1])
            if bool((seen & (keys > queries)).any()):
                raise SourceError("the model attends to later tokens too: it is an encoder, not a decoder.")
            widest = int(seen[-1].sum())
            window = widest if widest < max(PROBES) + 1 else None
            wanted = keys <= queries
            if window is not None:
                wanted &= keys > queries - window
            return bool(torch.equal(seen, wanted)), window
    except SourceError:
        raise
    except Exception:  # a function that needs more than positions, such as the tokens of the batch
        return False, None
