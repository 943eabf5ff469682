"""A tensor of a checkpoint that is read only when, and only as far as, it is needed.

A `Weight` knows its shape and how to read a range of its rows. Concatenation and transposition make new weights
out of old ones without reading anything, so the memory of an export is bounded by what one writer holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

CHUNK_BYTES = 64 << 20
"""What a reader of row blocks holds at once, in bytes of the weight's dtype."""


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """The codes of a matrix [N, K] that its checkpoint stores quantized, laid out as MatMulNBits wants them.

    A block of `block_size` weights along K shares a scale and a zero point, and w = (code - zero) * scale. The
    functions take a range start:stop of the N rows, as `Weight.read` does; n is stop - start.
    """

    bits: int
    block_size: int
    codes: Callable[[int, int], Array]
    """uint8 [n, blocks, block_size * bits / 8]; the code of the lower index lies in the lower bits of a byte."""
    scales: Callable[[int, int], Array]
    """[n, blocks], in the weight's dtype."""
    zero_points: Callable[[int, int], Array] | None = None
    """uint8 [n, ceil(blocks * bits / 8)], packed along the blocks like the codes; None: 2 ** (bits - 1) everywhere."""
    columns: Array | None = None
    """int64 [K]: the input feature behind each column of the codes, if it is not the identity (act-order). The weight
    itself reads in the order of the input features."""


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor to be read: `read(start, stop)` returns the rows start:stop of axis 0, C-contiguous."""

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    read: Callable[[int, int], Array]
    packed: PackedMatrix | None = None
    """The same matrix quantized, when the checkpoint has it so; what `read` returns is its exact dequantization."""

    @property
    def nbytes(self) -> int:
        """Size of the whole tensor in its dtype."""
        return math.prod(self.shape) * self.dtype.itemsize

    def array(self) -> Array:
        """The whole tensor."""
        return self.read(0, self.shape[0])

    def blocks(self) -> Iterator[Array]:
        """The tensor in order, as blocks of rows of about CHUNK_BYTES."""
        row_bytes = max(1, self.nbytes // max(1, self.shape[0]))
        step = max(1, CHUNK_BYTES // row_bytes)
        for start in range(0, self.shape[0], step):
            yield self.read(start, min(start + step, self.shape[0]))


def weight_from_array(array: Array) -> Weight:
    """A weight that is already in memory."""
    return Weight(array.shape, array.dtype, lambda start, stop: np.ascontiguousarray(array[start:stop]))


def transposed(weight: Weight) -> Weight:
    """The transpose of a matrix. Reading any of its rows reads the whole matrix, block by block."""
    rows, columns = weight.shape

    def read(start: int, stop: int) -> Array:
        result = np.empty((stop - start, rows), weight.dtype)  # [stop - start, R]
        first = 0
        for block in weight.blocks():
            result[:, first : first + len(block)] = block[:, start:stop].T
            first += len(block)
        return result

    return Weight((columns, rows), weight.dtype, read)


def concatenated(weights: Sequence[Weight]) -> Weight:
    """The weights one below the other, along axis 0; packed, if all are packed alike."""
    starts = np.cumsum([0, *(weight.shape[0] for weight in weights)]).tolist()

    def join(reads: Sequence[Callable[[int, int], Array]]) -> Callable[[int, int], Array]:
        def read(start: int, stop: int) -> Array:
            parts = [
                part(max(start - first, 0), min(stop, end) - first)
                for part, first, end in zip(reads, starts[:-1], starts[1:], strict=True)
                if start < end and stop > first
            ]
            return np.concatenate(parts) if len(parts) != 1 else parts[0]

        return read

    packed = [weight.packed for weight in weights if weight.packed is not None]
    joined = None
    if len(packed) == len(weights) and all(_alike(packed[0], other) for other in packed):
        zero_points = [item.zero_points for item in packed if item.zero_points is not None]
        joined = replace(
            packed[0],
            codes=join([item.codes for item in packed]),
            scales=join([item.scales for item in packed]),
            zero_points=join(zero_points) if zero_points else None,
        )
    shape = (starts[-1], *weights[0].shape[1:])
    return Weight(shape, weights[0].dtype, join([weight.read for weight in weights]), joined)


def _alike(first: PackedMatrix, other: PackedMatrix) -> bool:
    """Whether the rows of two packed matrices can stand in one."""
    return (
        (first.bits, first.block_size) == (other.bits, other.block_size)
        and (first.zero_points is None) == (other.zero_points is None)
        and (first.columns is None) == (other.columns is None)
        and (first.columns is None or np.array_equal(first.columns, other.columns))  # type: ignore[arg-type]
    )
