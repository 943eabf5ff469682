"""A tensor of a checkpoint that is read only when, and only as far as, it is needed.

A `Weight` knows its shape and how to read a range of its rows. Concatenation and transposition make new weights
out of old ones without reading anything, so the memory of an export is bounded by what one writer holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

CHUNK_BYTES = 64 << 20
"""What a reader of row blocks holds at once, in bytes of the weight's dtype."""


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor to be read: `read(start, stop)` returns the rows start:stop of axis 0, C-contiguous."""

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    read: Callable[[int, int], Array]

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
    """The weights one below the other, along axis 0."""
    starts = np.cumsum([0, *(weight.shape[0] for weight in weights)]).tolist()

    def read(start: int, stop: int) -> Array:
        parts = [
            weight.read(max(start - first, 0), min(stop - first, weight.shape[0]))
            for weight, first in zip(weights, starts[:-1], strict=True)
            if start < first + weight.shape[0] and stop > first
        ]
        return np.concatenate(parts) if len(parts) != 1 else parts[0]

    return Weight((starts[-1], *weights[0].shape[1:]), weights[0].dtype, read)
