"""Activation-aware scales: input features that matter are multiplied before rounding, and divided before the product.

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", 2023
(https://arxiv.org/abs/2306.00978). The scales are a power of each feature's magnitude, shared by all matrices with the
same input; the exponent is searched so that the products' error on calibration data is least. That of the paper's
clipping is what the rounding itself searches (rounding.py), weighted by what the features are worth.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fmedge_converters.calibration.gptq import output_error
from fmedge_converters.rounding import Rounding, round_blocks

EXPONENTS = tuple(number / 10 for number in range(11))
"""The paper has twenty steps; the error changes little between these."""


def searched_scales(
    matrices: Sequence[torch.Tensor],
    mean_square: torch.Tensor,
    gram: torch.Tensor,
    roundings: Sequence[Rounding],
    groups: torch.Tensor | None = None,
) -> torch.Tensor:
    """What to multiply each input feature [K] of the matrices [N, K] by; the product of all factors is about 1.

    `groups` [K]: features of the same number get the same factor. With exponent 0, which is among those tried, all are
    1, so nothing gets worse.
    """
    magnitude = mean_square.sqrt()  # [K]
    if groups is not None:
        count = int(groups.max()) + 1
        sums = torch.zeros(count).index_add_(0, groups, magnitude)
        magnitude = (sums / torch.bincount(groups, minlength=count))[groups]
    best, scales = None, torch.ones_like(magnitude)
    for exponent in EXPONENTS:
        tried = _scales(magnitude, exponent)
        error = sum(
            output_error(matrix, rounded_with(matrix, tried, gram, rounding), gram)
            for matrix, rounding in zip(matrices, roundings, strict=True)
        )
        if best is None or error < best:
            best, scales = error, tried
    return scales


def rounded_with(matrix: torch.Tensor, scales: torch.Tensor, gram: torch.Tensor, rounding: Rounding) -> torch.Tensor:
    """What a matrix [N, K] becomes when its columns are rounded after they are multiplied by `scales` [K]."""
    rounded = round_blocks(matrix * scales, rounding, gram.diagonal() / scales.square())
    return rounded.dequantized(matrix.shape[1]) / scales


def _scales(magnitude: torch.Tensor, exponent: float) -> torch.Tensor:
    """Powers of magnitudes [K], around 1; features that are never used count as the least of the others."""
    if not magnitude.any():
        return torch.ones_like(magnitude)
    powers = magnitude.clamp(min=float(magnitude.max()) * 1e-4) ** exponent
    return powers / (powers.max() * powers.min()).sqrt()
