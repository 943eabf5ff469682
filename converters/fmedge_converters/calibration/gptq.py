"""GPTQ: round a matrix column by column, each error compensated by the columns that are still to come.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022
(https://arxiv.org/abs/2210.17323). The error that counts is that of the product on calibration data,
tr((W - Q) G (W - Q).T) with G = X.T @ X. Columns are taken in the order of their G[k, k], largest first (act-order);
scales belong to blocks of neighbouring columns and are chosen before, so that no column changes its place in the file
and the operator runs as it does for plain rounding. At the end each row gets the scales that are best for its codes,
which is a least-squares problem with one unknown for each block.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from fmedge_runtimes.errors import SourceError

from fmedge_converters.rounding import RoundedBlocks, Rounding, round_blocks

DAMPING = 0.01
"""Part of the mean of G's diagonal that is added to it, as in the paper."""
LAZY = 128
"""Columns whose errors reach the columns behind them in one product."""
REFIT_BYTES = 64 << 20
"""Of the largest array while scales are fitted to codes."""


def compensated_blocks(
    matrix: torch.Tensor, gram: torch.Tensor, rounding: Rounding, scale_dtype: torch.dtype = torch.float32
) -> RoundedBlocks:
    """Round a matrix [N, K] in fp32 whose inputs have the Gram matrix `gram` [K, K], in fp32.

    Raises SourceError when the Gram matrix holds numbers that are not finite.
    """
    start = round_blocks(matrix, rounding, gram.diagonal(), scale_dtype)
    found = replace(start, codes=_compensated_codes(matrix, gram, start, rounding))
    scales = fitted_scales(matrix, gram, found, positive=rounding.positive).to(scale_dtype).float()
    if rounding.positive:  # that of a block too small for the scale's type is 0
        scales = torch.where(scales > 0, scales, start.scales)
    return replace(found, scales=scales)


def _compensated_codes(
    matrix: torch.Tensor, gram: torch.Tensor, grid: RoundedBlocks, rounding: Rounding
) -> torch.Tensor:
    """Codes uint8 [N, blocks, block_size] on the scales and zero points of `grid`."""
    size = matrix.shape[1]
    order = torch.argsort(gram.diagonal(), descending=True)
    left = matrix[:, order]  # [N, K], a copy
    factor = _inverse_factor(gram[order][:, order])  # [K, K]
    inverse = torch.where(grid.scales == 0, 0.0, 1 / grid.scales)  # [N, blocks]
    zeros = torch.full_like(grid.scales, 1 << (rounding.bits - 1))
    if grid.zero_points is not None:
        zeros = grid.zero_points.float()
    codes = grid.codes.clone()  # of the padding, too
    flat = codes.flatten(1)  # a view
    for start in range(0, size, LAZY):
        stop = min(start + LAZY, size)
        part, inner = left[:, start:stop].contiguous(), factor[start:stop, start:stop]
        errors = torch.empty_like(part)
        for column in range(stop - start):
            number = int(order[start + column])
            block = number // grid.codes.shape[2]
            scale, zero = grid.scales[:, block], zeros[:, block]
            found = (part[:, column] * inverse[:, block] + zero).round_().clamp_(0, (1 << rounding.bits) - 1)
            flat[:, number] = found.to(torch.uint8)
            error = (part[:, column] - (found - zero) * scale) / inner[column, column]
            part[:, column:].addr_(error, inner[column, column:], alpha=-1)
            errors[:, column] = error
        left[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
    return codes


def _inverse_factor(gram: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of a damped Gram matrix; stronger damping where fp32 needs it."""
    mean = float(gram.diagonal().mean())
    if mean == 0:  # no input was ever different from 0: every rounding is as good
        return torch.eye(len(gram))
    damping = DAMPING
    while damping < 1e6:
        lower, failed = torch.linalg.cholesky_ex(_damped(gram, damping))
        if not failed:
            upper: torch.Tensor
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and torch.isfinite(upper).all():
                return upper
        damping *= 10
    raise SourceError("activations of the calibration text are not finite, so nothing can be fitted to them.")


def _damped(gram: torch.Tensor, damping: float) -> torch.Tensor:
    damped = gram.clone()
    damped.diagonal().add_(damping * float(gram.diagonal().mean()))
    return damped


def fitted_scales(
    matrix: torch.Tensor, gram: torch.Tensor, rounded: RoundedBlocks, *, positive: bool = False
) -> torch.Tensor:
    """The scales [N, blocks] with which given codes have the least error in the product; rows that would get one that
    is not `positive` keep theirs."""
    rows, blocks, block = rounded.codes.shape
    pad = blocks * block - matrix.shape[1]
    weight = torch.nn.functional.pad(_damped(gram, DAMPING), (0, pad, 0, pad)).view(blocks, block, blocks, block)
    values = torch.nn.functional.pad(matrix, (0, pad)).view(rows, blocks, block)
    zeros = float(1 << (rounded.bits - 1)) if rounded.zero_points is None else rounded.zero_points.float().unsqueeze(-1)
    steps = rounded.codes.float() - zeros  # [N, blocks, block]
    scales = rounded.scales.clone()
    at_once = max(1, REFIT_BYTES // (4 * blocks * blocks * block))
    for start in range(0, rows, at_once):
        part = slice(start, start + at_once)
        # q.T G for the codes q of each block: [n, blocks, blocks, block]
        spread = torch.einsum("ngi,gihj->nghj", steps[part], weight)
        system = torch.einsum("nghj,nhj->ngh", spread, steps[part])
        wanted = torch.einsum("nghj,nhj->ng", spread, values[part])
        mean = system.diagonal(dim1=1, dim2=2).mean(1).clamp(min=torch.finfo(torch.float32).tiny)  # [n]
        system.diagonal(dim1=1, dim2=2).add_(1e-6 * mean.unsqueeze(-1))
        solved, failed = torch.linalg.solve_ex(system, wanted)
        usable = (failed == 0) & torch.isfinite(solved).all(-1)
        if positive:
            nothing = (steps[part] == 0).all(-1)  # [n, blocks], whose scale means nothing
            solved = torch.where(nothing, scales[part], solved)
            usable &= (solved > 0).all(-1)
        scales[part] = torch.where(usable.unsqueeze(-1), solved, scales[part])
    return scales


def output_error(matrix: torch.Tensor, rounded: torch.Tensor, gram: torch.Tensor) -> float:
    """The squared error of the product with `rounded` [N, K] in place of `matrix`, over the Gram matrix's inputs."""
    difference = matrix - rounded
    return float(((difference @ gram) * difference).sum())
