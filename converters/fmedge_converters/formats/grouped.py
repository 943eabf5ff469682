"""A matrix of small integers whose groups of columns share a scale and a zero point: what AWQ, GPTQ, compressed-tensors
and GGUF store, each in a layout of its own.

    w[n, k] = (code[n, k] - zero[n, g]) * scale[n, g]          g the group of column k

A format's file finds the layout; here the matrix becomes a weight, which reads as floats and carries the codes as
MatMulNBits wants them, when that operator has a form for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from fmedge_runtimes.errors import SourceError

from fmedge_converters.weight import Array, PackedMatrix, Read, Weight

BITS = (2, 4, 8)
"""Widths that MatMulNBits has, and that no byte cuts through."""
BLOCK_SIZES = (256, 128, 64, 32, 16)
"""Block sizes that MatMulNBits has."""
WHOLE_ROW_BLOCK = 128
"""For rows with one scale, which any block size can carry; larger blocks have no fast kernels."""


@dataclass(frozen=True, slots=True)
class GroupedMatrix:
    """The integers of a matrix [N, K] and their scales; n is stop - start in what is read, G the number of groups."""

    name: str
    """In the checkpoint, for messages."""
    shape: tuple[int, int]
    bits: int
    """One of BITS."""
    group_size: int
    codes: Read
    """uint8 [n, ceil(K * bits / 8)], along K, the lower index in the lower bits of a byte."""
    scales: Callable[[int, int], torch.Tensor]
    """[n, G], in the type that they are stored in."""
    zeros: Read | None = None
    """uint8 [n, G]; None: 2 ** (bits - 1) everywhere."""
    groups: Array | None = None
    """int64 [K]: the group of each column, if groups are not runs of `group_size` columns (act-order)."""


def unpacked(codes: Array, bits: int) -> Array:
    """Bytes [n, m] as one code each [n, m * 8 / bits]."""
    if bits == 8:
        return codes
    each = 8 // bits
    result = np.empty((len(codes), codes.shape[1] * each), np.uint8)
    for index in range(each):
        result[:, index::each] = (codes >> (index * bits)) & ((1 << bits) - 1)
    return result


def packed(codes: Array, bits: int) -> Array:
    """Codes [n, m] in bytes [n, ceil(m * bits / 8)], the lower index in the lower bits."""
    if bits == 8:
        return np.ascontiguousarray(codes)
    each = 8 // bits
    if codes.shape[1] % each:
        codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % each)))
    result = codes[:, ::each].copy()
    for index in range(1, each):
        result |= codes[:, index::each] << (index * bits)
    return result


def floats(tensor: torch.Tensor, dtype: np.dtype[np.generic], name: str) -> Array:
    """A stored tensor in the target's type.

    Raises SourceError for values that it cannot hold.
    """
    kind = torch.from_numpy(np.empty(0, dtype)).dtype
    array: Array = tensor.to(kind).contiguous().numpy()
    if not np.isfinite(array).all():
        raise SourceError(
            f"{name} has values that are not finite, or beyond the range of {dtype.name}; "
            "the checkpoint is damaged, or cannot run in that type."
        )
    return array


def grouped_weight(matrix: GroupedMatrix, dtype: np.dtype[np.generic]) -> Weight:
    """The weight of a matrix: its floats, exact in fp32, and its codes if MatMulNBits can carry them."""
    size = matrix.shape[1]
    groups = matrix.groups if matrix.groups is not None else np.arange(size) // matrix.group_size  # [K]
    middle = 1 << (matrix.bits - 1)
    whole = matrix.groups is None and size % matrix.group_size == 0

    def each_column(values: Array) -> Array:
        """Numbers of groups [n, G] as they meet the columns: [n, G, 1], or one for each column [n, K]."""
        return values[..., None] if whole else np.take(values, groups, axis=1)

    def read(start: int, stop: int) -> Array:
        codes = unpacked(matrix.codes(start, stop), matrix.bits)[:, :size]  # [n, K]
        scales = floats(matrix.scales(start, stop), np.dtype(np.float32), matrix.name)  # [n, G]
        # Exact: differences of 9 bits times scales of at most 11. Narrower types round once, when they are made.
        values = codes.astype(np.float32)
        values = values.reshape(len(values), -1, matrix.group_size) if whole else values
        values -= middle if matrix.zeros is None else each_column(matrix.zeros(start, stop).astype(np.float32))
        values *= each_column(scales)
        values = values.reshape(len(values), size)
        return values if dtype == np.float32 else floats(torch.from_numpy(values), dtype, matrix.name)

    return Weight(matrix.shape, dtype, read, _packed_matrix(matrix, dtype))


def _block_size(group_size: int, size: int) -> int | None:
    if group_size >= size:
        return min(WHOLE_ROW_BLOCK, next((block for block in reversed(BLOCK_SIZES) if block >= size), WHOLE_ROW_BLOCK))
    return next((block for block in BLOCK_SIZES if group_size % block == 0), None)


def _packed_matrix(matrix: GroupedMatrix, dtype: np.dtype[np.generic]) -> PackedMatrix | None:
    """The matrix for MatMulNBits; None when it has no block size that divides the groups."""
    size = matrix.shape[1]
    group_size = matrix.group_size
    block_size = _block_size(group_size, size)
    if block_size is None:
        return None
    columns = None
    if matrix.groups is not None:
        columns = np.argsort(matrix.groups, kind="stable")  # [K]
        if not np.array_equal(matrix.groups[columns], np.arange(size) // group_size):
            return None  # groups of unequal sizes
        if np.array_equal(columns, np.arange(size)):
            columns = None
    blocks = -(-size // block_size)
    block_bytes = block_size * matrix.bits // 8

    def codes(start: int, stop: int) -> Array:
        data = matrix.codes(start, stop)
        if columns is not None:
            data = packed(np.take(unpacked(data, matrix.bits), columns, axis=1), matrix.bits)
        data = data[:, : math.ceil(size * matrix.bits / 8)]
        missing = blocks * block_bytes - data.shape[1]
        if missing:
            data = np.pad(data, ((0, 0), (0, missing)))
        return np.ascontiguousarray(data).reshape(stop - start, blocks, block_bytes)

    def by_block(values: Array) -> Array:
        """[n, G] to [n, blocks]: the blocks of a group have what the group has."""
        each = blocks if values.shape[1] == 1 else group_size // block_size
        return values if each == 1 else np.repeat(values, each, axis=1)[:, :blocks]

    def scales(start: int, stop: int) -> Array:
        return np.ascontiguousarray(by_block(floats(matrix.scales(start, stop), dtype, matrix.name)))

    def zero_points(start: int, stop: int) -> Array:
        if matrix.zeros is None:
            raise RuntimeError("a matrix without zero points was asked for them")
        return packed(by_block(matrix.zeros(start, stop)), matrix.bits)

    return PackedMatrix(matrix.bits, block_size, codes, scales, None if matrix.zeros is None else zero_points, columns)
