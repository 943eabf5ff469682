"""Rounding to floats of 8 bits, E4M3 without infinities: four bits of exponent, three of mantissa, largest 448.

A float's error is a part of the number itself, so scales matter little, but for where in a binade large numbers fall:
steps are an eighth of a number just above a power of two, and a sixteenth just below one. Of scales within a binade a
row takes the one with the least squared error.
Micikevicius et al., "FP8 Formats for Deep Learning", 2022 (https://arxiv.org/abs/2209.05433).
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch

from fmedge_converters.weight import Array

E4M3: np.dtype[np.generic] = np.dtype(ml_dtypes.float8_e4m3fn)
LARGEST = 448.0
LEVELS = (448.0, 416.0, 384.0, 352.0, 320.0, 288.0, 256.0, 240.0)
"""What the largest weight of a row becomes; the first is plain rounding."""
SMALLEST = 2.0**-24
"""Of a scale that fp16 holds."""


def quantize_rows_float8(rows: Array) -> tuple[Array, Array]:
    """Quantize rows [n, K] to E4M3 [n, K] with float32 scales [n] that fp16 holds if it holds the rows."""
    values = torch.from_numpy(np.ascontiguousarray(rows)).to(torch.float32)
    peaks = values.abs().amax(-1)  # [n]
    best: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    for level in LEVELS:
        scales = torch.where(peaks > 0, peaks / level, 1.0).clamp(min=SMALLEST).half().float()  # [n]
        codes = (values / scales[:, None]).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        error = (codes.float() * scales[:, None] - values).square_().sum(-1)  # [n]
        if best is None:
            best = error, scales, codes
            continue
        better = error < best[0]
        chosen = torch.where(better[:, None], codes.view(torch.uint8), best[2].view(torch.uint8))
        best = (
            torch.where(better, error, best[0]),
            torch.where(better, scales, best[1]),
            chosen.view(torch.float8_e4m3fn),
        )
    if best is None:
        raise RuntimeError("no levels")
    return best[2].view(torch.uint8).numpy().view(E4M3), best[1].numpy()
