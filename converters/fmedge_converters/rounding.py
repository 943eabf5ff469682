"""Rounding of matrices in blocks that share a scale: w ~ (code - zero) * scale.

Plain rounding takes the scale from the extremes of a block. Searched rounding minimises the squared error, weighted by
how much each input feature matters: for each scale of a grid around the plain one it rounds, and puts in the scale
that is best for those codes, which has a closed form; the best of all is refined by rounding and refitting in turn.
Refining alone (Lloyd, "Least squares quantization in PCM", 1982) ends in the minimum next to where it starts. At last
the block gets back the length, along its own direction, that least squares take from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

AT_ONCE = 1 << 17
"""Weights that are searched at once, few enough for a processor's caches."""
REFINEMENTS = 2
LEVELS_SYMMETRIC = {
    2: (2.0, 1.6, 1.8, 2.25, 2.5, 2.75, 3.0, 3.5),
    4: (8.0, 5.0, 6.0, 6.5, 7.0, 7.25, 7.5, 7.75, 8.25, 8.5, 8.75, 9.0, 9.5, 10.0),
    8: (128.0, 127.5, 128.5),
}
"""What the weight of largest magnitude is rounded to, before it is cut off; the first is plain rounding."""
LEVELS_ASYMMETRIC = {
    2: (3.0, 2.6, 3.4, 3.8, 4.2),
    4: (15.0, 12.0, 13.0, 13.5, 14.0, 14.5, 15.5, 16.0, 16.5, 17.0, 18.0),
    8: (255.0, 254.5, 255.5),
}
"""How many steps lie between the extremes."""


@dataclass(frozen=True, slots=True)
class Rounding:
    """How the rows of a matrix are rounded."""

    bits: int
    block_size: int
    """Weights along K that share a scale, and a zero point; 0: a whole row."""
    symmetric: bool = True
    """The zero point is 2 ** (bits - 1) everywhere; else each block has its own."""
    search: bool = True
    """Minimise the error; else take the extremes of each block."""
    positive: bool = False
    """Scales are positive; else those of symmetric blocks have the sign that gives the largest weight the code which
    the other sign lacks."""

    def stored_bits(self, rows: int, size: int, scale_bits: int = 16) -> int:
        """Bits of a matrix [rows, size] in a file: codes of whole blocks, scales, zero points in whole bytes."""
        block = self.block_size or size
        blocks = -(-size // block)
        zeros = 0 if self.symmetric else -(-blocks * self.bits // 8) * 8
        return rows * (blocks * (block * self.bits + scale_bits) + zeros)


@dataclass(frozen=True, slots=True)
class Cost:
    """What a rounding of a matrix does to the output of its model."""

    rounding: Rounding
    divergence: float
    """KL divergence, in nats per token."""
    rows: torch.Tensor | None = field(default=None, compare=False, repr=False)
    """The part of each row, [N], where it is known."""


@dataclass(frozen=True, slots=True)
class RoundedBlocks:
    """Rows [n, K] as codes, K filled up with zeros to whole blocks."""

    bits: int
    codes: torch.Tensor
    """uint8 [n, blocks, block_size]."""
    scales: torch.Tensor
    """float32 [n, blocks]; may be negative unless the rounding says otherwise."""
    zero_points: torch.Tensor | None
    """uint8 [n, blocks]; None: 2 ** (bits - 1) everywhere."""

    def dequantized(self, size: int) -> torch.Tensor:
        """The weights [n, size] that an operator computes with."""
        zeros = float(1 << (self.bits - 1)) if self.zero_points is None else self.zero_points.unsqueeze(-1).float()
        values = (self.codes.float() - zeros) * self.scales.unsqueeze(-1)  # [n, blocks, block_size]
        return values.flatten(1)[:, :size]

    def packed_codes(self) -> torch.Tensor:
        """Bytes [n, blocks, block_size * bits / 8], the first weight in the lowest bits of a byte."""
        return _packed(self.codes, self.bits)

    def packed_zero_points(self) -> torch.Tensor | None:
        """Bytes [n, ceil(blocks * bits / 8)], packed along the blocks like codes; None without zero points."""
        if self.zero_points is None:
            return None
        each = 8 // self.bits
        return _packed(torch.nn.functional.pad(self.zero_points, (0, -self.zero_points.shape[1] % each)), self.bits)


def round_blocks(
    rows: torch.Tensor,
    rounding: Rounding,
    importance: torch.Tensor | None = None,
    scale_dtype: torch.dtype = torch.float32,
) -> RoundedBlocks:
    """Round rows [n, K]. `importance` [K] weights the squared error of each column; None: all alike.

    The scales that result are numbers of `scale_dtype`, to which the codes are fitted.
    """
    count, size = rows.shape
    block = rounding.block_size or size
    blocks = -(-size // block)
    values = _in_blocks(rows.to(torch.float32), blocks, block)  # [n, blocks, block]
    weights = None
    if importance is not None:
        mean = importance.float().mean().clamp(min=torch.finfo(torch.float32).tiny)
        # A feature that was never seen keeps a little weight: other text may have it.
        weights = _in_blocks((importance.float() / mean).clamp(min=1e-4)[None], blocks, block)  # [1, blocks, block]
    if not rounding.search:
        inverse, zeros = _plain(values, rounding)
        scales = torch.where(inverse == 0, 0.0, 1.0 / inverse).to(scale_dtype).float()
        return _rounded(values, scales, zeros, rounding)
    step = max(1, AT_ONCE // max(1, blocks * block))
    parts = [
        _searched(values[start : start + step], weights, rounding, scale_dtype)
        for start in range(0, max(1, count), step)
    ]
    return joined(parts)


def joined(parts: Sequence[RoundedBlocks]) -> RoundedBlocks:
    """Rows that were rounded alike, one part below the other."""
    if len(parts) == 1:
        return parts[0]
    zero_points = [part.zero_points for part in parts if part.zero_points is not None]
    return RoundedBlocks(
        parts[0].bits,
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat(zero_points) if zero_points else None,
    )


def _in_blocks(rows: torch.Tensor, blocks: int, block: int) -> torch.Tensor:
    """Rows [n, K] as [n, blocks, block], filled up with zeros."""
    missing = blocks * block - rows.shape[1]
    padded = torch.nn.functional.pad(rows, (0, missing)) if missing else rows
    return padded.reshape(len(rows), blocks, block)


def _peaks(values: torch.Tensor) -> torch.Tensor:
    """The weight of largest magnitude of each block, with its sign: [n, blocks]."""
    # Both extremes by themselves: torch has no fast kernel for aminmax.
    lowest, highest = values.amin(-1), values.amax(-1)
    return torch.where(-lowest > highest, lowest, highest)


def _symmetric(values: torch.Tensor, rounding: Rounding) -> Callable[[float], torch.Tensor]:
    """One over the scales [n, blocks] with which each block's weight of largest magnitude has the code -level.

    With positive scales the lowest weight has that, or the highest one level - 1, whichever takes the larger scale.
    """
    if not rounding.positive:
        towards = _inverse(-_peaks(values))
        return lambda level: towards * level
    lowest, highest = values.amin(-1), values.amax(-1)
    return lambda level: _inverse(torch.maximum(highest / (level - 1), lowest / -level).clamp_(min=0))


def _inverse(steps: torch.Tensor) -> torch.Tensor:
    return torch.where(steps == 0, 0.0, 1.0 / steps)


def _plain(values: torch.Tensor, rounding: Rounding) -> tuple[torch.Tensor, torch.Tensor]:
    """One over each block's scale, and its zero point: [n, blocks] both."""
    if rounding.symmetric:
        half = 1 << (rounding.bits - 1)
        inverse = _symmetric(values, rounding)(half)
        return inverse, torch.full_like(inverse, half)
    top = (1 << rounding.bits) - 1
    lowest, highest = values.amin(-1).clamp(max=0), values.amax(-1).clamp(min=0)
    inverse = _inverse((highest - lowest) / top)
    return inverse, (-lowest * inverse).round_().clamp_(0, top)


def _grid(values: torch.Tensor, rounding: Rounding) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Candidates as `_plain` has them, its own first."""
    candidates = [_plain(values, rounding)]
    if rounding.symmetric:
        half = 1 << (rounding.bits - 1)
        inverse_of, zeros = _symmetric(values, rounding), candidates[0][1]
        return candidates + [(inverse_of(level), zeros) for level in LEVELS_SYMMETRIC[rounding.bits] if level != half]
    top = (1 << rounding.bits) - 1
    lowest, highest = values.amin(-1).clamp(max=0), values.amax(-1).clamp(min=0)
    width = _inverse(highest - lowest)
    for level in LEVELS_ASYMMETRIC[rounding.bits]:
        inverse = width * level
        # What is cut off when the steps are too small is divided between both ends.
        exact = -lowest * inverse - (level - top) / 2
        below = exact.floor()
        candidates += [(inverse, below.clamp(0, top)), (inverse, (below + 1).clamp(0, top))]
    return candidates


def _searched(
    values: torch.Tensor, weights: torch.Tensor | None, rounding: Rounding, scale_dtype: torch.dtype
) -> RoundedBlocks:
    weighted = values if weights is None else values * weights
    (plain, plain_zeros), *others = _grid(values, rounding)
    plain_gain, scales = _fit(values, weighted, weights, plain, plain_zeros, rounding.bits)
    best, zeros = plain_gain, plain_zeros
    for inverse, zero in others:
        gain, fitted = _fit(values, weighted, weights, inverse, zero, rounding.bits)
        better = gain > best
        best = torch.where(better, gain, best)
        scales = torch.where(better, fitted, scales)
        zeros = torch.where(better, zero, zeros)
    for _ in range(REFINEMENTS):
        gain, fitted = _fit(values, weighted, weights, _inverse(scales), zeros, rounding.bits)
        better = gain > best
        best, scales = torch.where(better, gain, best), torch.where(better, fitted, scales)
    # The scale of least error makes every block a little shorter, and errors that all point one way add up.
    whole = (weighted * values).sum(-1)
    scales = torch.where(best > 0, scales * (whole / best), scales).to(scale_dtype).float()
    gain, _ = _fit(values, weighted, weights, _inverse(scales), zeros, rounding.bits)
    lost = gain < plain_gain
    scales = torch.where(lost, _inverse(plain).to(scale_dtype).float(), scales)
    return _rounded(values, scales, torch.where(lost, plain_zeros, zeros), rounding)


def _fit(
    values: torch.Tensor,
    weighted: torch.Tensor,
    weights: torch.Tensor | None,
    inverse: torch.Tensor,
    zeros: torch.Tensor,
    bits: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """By how much a scale's codes lower the squared error if they get their best scale, and that scale: [n, blocks].

    Codes q with scale s are off by sum(h v v) - 2 s sum(h v q) + s s sum(h q q): least at sum(h v q) / sum(h q q).
    """
    codes = _codes(values, inverse, zeros, bits)
    product = (codes * weighted).sum(-1)  # [n, blocks]
    codes *= codes
    square = (codes if weights is None else codes.mul_(weights)).sum(-1)
    scale = torch.where(square == 0, 0.0, product / square)
    return product * scale, scale


def _codes(values: torch.Tensor, inverse: torch.Tensor, zeros: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes less their zero points, as floats: [n, blocks, block]."""
    zero = zeros.unsqueeze(-1)
    codes = (values * inverse.unsqueeze(-1)).round_()
    return torch.minimum(torch.maximum(codes, -zero, out=codes), (1 << bits) - 1 - zero, out=codes)


def _rounded(values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, rounding: Rounding) -> RoundedBlocks:
    """The nearest codes for scales [n, blocks]."""
    codes = _codes(values, _inverse(scales), zeros, rounding.bits).add_(zeros.unsqueeze(-1))
    # int16 first: torch has no fast kernel from float to uint8.
    unsigned = codes.to(torch.int16).to(torch.uint8)
    if rounding.positive:
        # Of zeros any scale is right; that of a block too small for the scale's type is 0, and its codes are zeros.
        scales = torch.where((codes == zeros.unsqueeze(-1)).all(-1), 1.0, scales)
    return RoundedBlocks(rounding.bits, unsigned, scales, None if rounding.symmetric else zeros.to(torch.uint8))


def _packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of `bits` bits along the last axis, several in a byte."""
    each = 8 // bits
    if each == 1:
        return codes
    parts = codes.reshape(*codes.shape[:-1], -1, each)
    packed = parts[..., 0].clone()
    for place in range(1, each):
        packed |= parts[..., place] << (bits * place)
    return packed
