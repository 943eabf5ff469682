"""Rounding to floats of 8 bits, E4M3 without infinities: four bits of exponent, three of mantissa, largest 448.

A float's error is a part of the number itself, so scales matter little: the largest number becomes the largest code.
Micikevicius et al., "FP8 Formats for Deep Learning", 2022 (https://arxiv.org/abs/2209.05433).
"""

from __future__ import annotations

import functools

import ml_dtypes
import numpy as np
import torch

from fmedge_converters.schemes.dynamic_int8 import QuantizedRows
from fmedge_converters.weight import Array, Weight, mapped

E4M3: np.dtype[np.generic] = np.dtype(ml_dtypes.float8_e4m3fn)
LARGEST = 448.0
SMALLEST = 2.0**-24
"""Of a scale that fp16 holds."""


def quantize_rows_float8(rows: Array) -> tuple[Array, Array]:
    """Quantize rows [n, K] to E4M3 [n, K] with float32 scales [n], which are numbers of fp16."""
    values = _floats(rows)
    scales = _scales(values.abs().amax(-1))  # [n]
    return _codes(values, scales[:, None]), scales.numpy()


def by_channel(weight: Weight) -> tuple[Weight, Weight]:
    """The codes [N, K] of a weight, and a scale for each row [N]."""
    rows = QuantizedRows(weight, quantize_rows_float8, E4M3)
    return rows.codes, rows.scales


def by_tensor(weight: Weight) -> tuple[Weight, Weight]:
    """The codes [N, K] of a weight, and one scale for all of it []."""

    @functools.cache
    def scale() -> torch.Tensor:
        return _scales(torch.stack([_floats(block).abs().max() for block in weight.blocks()]).max())

    codes = mapped(lambda rows: _codes(_floats(rows), scale()), [weight], E4M3)
    return codes, Weight((), np.dtype(np.float32), lambda *_: scale().numpy())


def _floats(rows: Array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(rows)).float()


def _scales(peaks: torch.Tensor) -> torch.Tensor:
    """Scales for numbers of these largest magnitudes."""
    return torch.where(peaks > 0, peaks / LARGEST, 1.0).clamp(min=SMALLEST).half().float()


def _codes(values: torch.Tensor, scales: torch.Tensor) -> Array:
    # torch does not saturate by itself: what is beyond the largest code would be no number.
    codes = (values / scales).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return codes.view(torch.uint8).numpy().view(E4M3)
