"""A tensor of a checkpoint that is read only when, and only as far as, it is needed.

A `Weight` knows its shape and how to read a range of its rows. Joining, cutting, reordering and reshaping make new
weights out of old ones without reading anything, so the memory of an export is bounded by what one writer holds.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fmedge_converters.rounding import Cost, Rounding

Array = npt.NDArray[Any]
Read = Callable[[int, int], Array]

CHUNK_BYTES = 4 << 20
"""What a reader of row blocks holds at once, in bytes of the weight's dtype; few enough for a processor's caches."""
ACROSS_BYTES = 256 << 20
"""The same for weights of which any row costs all rows of another one."""
WORKERS = min(8, os.cpu_count() or 1)
"""Threads that make blocks side by side."""

UNREADABLE = np.dtype("V1")
"""The dtype of a weight whose storage has no meaning by itself; asking for its numbers is an error."""
RUNS = 16
"""As many runs of neighbouring rows are read one by one."""


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """The codes of a matrix [N, K] that its checkpoint stores quantized, laid out as MatMulNBits wants them.

    A block of `block_size` weights along K shares a scale and a zero point, and w = (code - zero) * scale. The
    functions take a range start:stop of the N rows, as `Weight.read` does; n is stop - start. The rows of several
    matrices in one tensor [E, N, K] are counted through: E * N.
    """

    bits: int
    block_size: int
    codes: Read
    """uint8 [n, blocks, block_size * bits / 8]; the code of the lower index lies in the lower bits of a byte."""
    scales: Read
    """[n, blocks], in `scale_dtype`."""
    zero_points: Read | None = None
    """uint8 [n, ceil(blocks * bits / 8)], packed along the blocks like the codes; None: 2 ** (bits - 1) everywhere."""
    columns: Array | None = None
    """int64 [K]: the input feature behind each column of the codes, if it is not the identity (act-order). The weight
    itself reads in the order of the input features."""
    of_source: bool = True
    """False for codes that an export has fitted."""
    scale_dtype: np.dtype[np.generic] | None = None
    """None: the weight's own."""


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor to be read: `read(start, stop)` returns the rows start:stop of axis 0, C-contiguous.

    A scalar has no axis and counts as one row: `read(0, 1)` returns it.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    read: Read
    packed: PackedMatrix | None = None
    """The same matrix quantized, when the checkpoint has it so; what `read` returns is its exact dequantization."""
    step: int | None = None
    """Rows to read at once, for weights whose rows take more to read than their own size."""
    original: Read | None = None
    """The `read` of the weight whose bytes these are under another shape."""
    importance: Array | None = field(default=None, compare=False)
    """float32 [K]: how much an error in the weights of each input feature matters, on any scale; [E, K] for a stack of
    matrices [E, N, K]. None: all alike. It says nothing of the axes of this tensor, which may be transposed."""
    rounding: Rounding | None = None
    """How a scheme that rounds in blocks is to round this one; None: as it rounds others."""
    costs: tuple[Cost, ...] = ()
    """What roundings of this matrix have been found to cost."""

    @property
    def identity(self) -> Read:
        """Weights of equal identity hold the same bytes in the same order."""
        return self.original or self.read

    @property
    def rows_at_once(self) -> int:
        """Rows of a block."""
        return self.step or max(1, CHUNK_BYTES // max(1, self.nbytes // max(1, self.rows)))

    @property
    def rows(self) -> int:
        """How many rows can be read."""
        return self.shape[0] if self.shape else 1

    @property
    def nbytes(self) -> int:
        """Size of the whole tensor in its dtype."""
        return math.prod(self.shape) * self.dtype.itemsize

    def array(self) -> Array:
        """The whole tensor."""
        return self.read(0, self.rows)

    def ranges(self) -> list[tuple[int, int]]:
        """The rows of each block, start and stop: `rows_at_once` of them, in order."""
        step = self.rows_at_once
        return [(start, min(start + step, self.rows)) for start in range(0, self.rows, step)]

    def blocks(self, workers: int = 1) -> Iterator[Array]:
        """The tensor in order, block by block; while one is used, others are read by so many threads."""
        ranges = self.ranges()
        if workers == 1 or self.rows_at_once * self.nbytes > CHUNK_BYTES * self.rows:
            yield from (self.read(*rows) for rows in ranges)
            return
        waiting: deque[Future[Array]] = deque()
        pool = ThreadPoolExecutor(workers)
        try:
            for rows in ranges:
                waiting.append(pool.submit(self.read, *rows))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def weight_from_array(array: Array) -> Weight:
    """A weight that is already in memory."""
    return Weight(
        array.shape, array.dtype, lambda start, stop: np.ascontiguousarray(array[start:stop]) if array.ndim else array
    )


def equal(first: Weight, second: Weight) -> bool:
    """Whether two weights hold the same numbers. Reads both, block by block."""
    if first.shape != second.shape:
        return False
    step = min(first.rows_at_once, second.rows_at_once)
    ranges = [(start, min(start + step, first.rows)) for start in range(0, first.rows, step)]
    return all(np.array_equal(first.read(*rows), second.read(*rows)) for rows in ranges)


def concatenated(weights: Sequence[Weight], axis: int = 0) -> Weight:
    """The weights joined along an axis. Rows that are all packed alike stay packed.

    Raises ValueError when their other dimensions differ.
    """
    first = weights[0]
    others = {(*weight.shape[:axis], *weight.shape[axis + 1 :]) for weight in weights}
    if len(others) != 1 or any(weight.dtype != first.dtype for weight in weights):
        raise ValueError(f"shapes {[list(weight.shape) for weight in weights]} do not join along axis {axis}")
    size = sum(weight.shape[axis] for weight in weights)
    shape = (*first.shape[:axis], size, *first.shape[axis + 1 :])
    rows_stay = axis < len(shape) - 1
    packed = _joined(weights, axis) if rows_stay else None
    importance = _joined_importance(weights, axis) if rows_stay else None
    rounding = first.rounding if all(weight.rounding == first.rounding for weight in weights) else None
    made = Weight(
        shape,
        first.dtype,
        _below([weight.read for weight in weights], [weight.rows for weight in weights]),
        packed,
        _step(weights),
        importance=importance,
        rounding=rounding,
        costs=_joined_costs(weights) if rows_stay else (),
    )
    if axis == 0:
        return made

    def read(start: int, stop: int) -> Array:
        result = np.empty((stop - start, *shape[1:]), first.dtype)
        place = 0
        for weight in weights:
            end = place + weight.shape[axis]
            result[(*(slice(None),) * axis, slice(place, end))] = weight.read(start, stop)
            place = end
        return result

    return replace(made, read=read)


def _joined_costs(weights: Sequence[Weight]) -> tuple[Cost, ...]:
    """The sums, for roundings that were tried with all of them."""
    common = [cost.rounding for cost in weights[0].costs]
    found = [{cost.rounding: cost.divergence for cost in weight.costs} for weight in weights]
    return tuple(
        Cost(rounding, sum(costs[rounding] for costs in found))
        for rounding in common
        if all(rounding in costs for costs in found)
    )


def _joined_importance(weights: Sequence[Weight], axis: int) -> Array | None:
    """That of stacks one below the other; the mean for matrices with the same input features. None if one has none."""
    known = [weight.importance for weight in weights if weight.importance is not None]
    if len(known) != len(weights) or any(one.shape[-1] != known[0].shape[-1] for one in known):
        return None
    if axis == 0 and all(one.ndim == 2 for one in known):
        return np.concatenate(known)
    if any(one.shape != known[0].shape for one in known):
        return None
    return np.asarray(np.mean(known, axis=0, dtype=np.float32))


def _step(weights: Sequence[Weight]) -> int | None:
    """Rows to read at once of what reads the same rows of all of these."""
    return max((weight.step for weight in weights if weight.step is not None), default=None)


def _below(reads: Sequence[Read], rows: Sequence[int]) -> Read:
    """Read several tensors as one, each below the one before."""
    starts = np.cumsum([0, *rows]).tolist()

    def read(start: int, stop: int) -> Array:
        touched = [
            (part, max(start, first), min(stop, end), first)
            for part, first, end in zip(reads, starts[:-1], starts[1:], strict=True)
            if start < end and stop > first
        ]
        if not touched:
            return reads[0](0, 0)
        # One part at a time in memory, beside the result.
        part, first, last, offset = touched[0]
        rows = part(first - offset, last - offset)
        if len(touched) == 1:
            return rows
        result = np.empty((stop - start, *rows.shape[1:]), rows.dtype)
        result[first - start : last - start] = rows
        for part, first, last, offset in touched[1:]:
            result[first - start : last - start] = part(first - offset, last - offset)
        return result

    return read


def _joined(weights: Sequence[Weight], axis: int) -> PackedMatrix | None:
    """The packed rows of weights that are joined along an axis of rows, None if they do not agree."""
    packed = [weight.packed for weight in weights if weight.packed is not None]
    if len(packed) != len(weights) or not all(_alike(packed[0], other) for other in packed):
        return None
    rows = [math.prod(weight.shape[:-1]) for weight in weights]
    zero_points = [item.zero_points for item in packed if item.zero_points is not None]
    below = replace(
        packed[0],
        codes=_below([item.codes for item in packed], rows),
        scales=_below([item.scales for item in packed], rows),
        zero_points=_below(zero_points, rows) if zero_points else None,
    )
    starts = np.cumsum([0, *rows])
    places = [
        start + np.arange(count).reshape(weight.shape[:-1])
        for start, count, weight in zip(starts[:-1], rows, weights, strict=True)
    ]
    return _packed_rows(below, np.concatenate(places, axis)) if axis else below


def _packed_rows(packed: PackedMatrix, places: Array) -> PackedMatrix:
    """The packed rows at `places`, in their order."""
    indices = places.reshape(-1)
    zero_points = None if packed.zero_points is None else _picked(packed.zero_points, indices)
    codes, scales = _picked(packed.codes, indices), _picked(packed.scales, indices)
    return replace(packed, codes=codes, scales=scales, zero_points=zero_points)


def joinable(first: Weight, other: Weight) -> bool:
    """Whether two matrices, one below the other, keep the codes that either of them has, and how they are rounded."""
    if first.rounding != other.rounding:
        return False
    if first.packed is None or other.packed is None:
        return first.packed is other.packed
    return _alike(first.packed, other.packed)


def _alike(first: PackedMatrix, other: PackedMatrix) -> bool:
    """Whether the rows of two packed matrices can stand in one."""
    same_order = first.columns is other.columns or (
        first.columns is not None and other.columns is not None and np.array_equal(first.columns, other.columns)
    )
    return (
        same_order
        and (first.bits, first.block_size, first.scale_dtype) == (other.bits, other.block_size, other.scale_dtype)
        and (first.zero_points is None) == (other.zero_points is None)
    )


def permuted(weight: Weight, axes: Sequence[int]) -> Weight:
    """The weight with its axes in another order, as `numpy.transpose` has it.

    While axis 0 stays in place a row costs a row; otherwise reading any row reads the whole tensor, block by block.
    """
    shape = tuple(weight.shape[axis] for axis in axes)
    first = axes[0] if axes else 0

    def read_rows(start: int, stop: int) -> Array:
        return np.ascontiguousarray(weight.read(start, stop).transpose(axes))

    def read_across(start: int, stop: int) -> Array:
        result = np.empty((stop - start, *shape[1:]), weight.dtype)
        place = list(axes).index(0)
        asked = (*(slice(None),) * first, slice(start, stop))
        row = 0
        for block in weight.blocks(WORKERS):
            result[(*(slice(None),) * place, slice(row, row + len(block)))] = block[asked].transpose(axes)
            row += len(block)
        return result

    # Whose columns are the input features may change; what is known of these does not.
    turned = replace(weight, shape=shape, read=read_rows, packed=None, original=None)
    if first == 0:
        return turned
    row_bytes = weight.nbytes // max(1, shape[0])
    return replace(turned, read=read_across, step=max(1, ACROSS_BYTES // max(1, row_bytes)))


def transposed(weight: Weight) -> Weight:
    """The transpose of a matrix."""
    return permuted(weight, (1, 0))


def reshaped(weight: Weight, shape: Sequence[int]) -> Weight:
    """The same numbers in the same order under another shape. Rows that stay whole stay packed.

    Raises ValueError when the shapes hold different amounts.
    """
    shape = tuple(shape)
    if math.prod(shape) != math.prod(weight.shape):
        raise ValueError(f"shape {list(weight.shape)} does not hold as much as {list(shape)}")
    old_row, new_row = math.prod(weight.shape[1:]), math.prod(shape[1:])

    def read(start: int, stop: int) -> Array:
        wanted = (stop - start, *shape[1:]) if shape else ()
        first, last = start * new_row, stop * new_row
        if first == last:
            return np.empty(wanted, weight.dtype)
        flat = weight.read(first // old_row, -(-last // old_row)).reshape(-1)
        offset = first // old_row * old_row
        return flat[first - offset : last - offset].reshape(wanted)

    rows_stay = shape[-1:] == weight.shape[-1:]
    packed, importance = (weight.packed, weight.importance) if rows_stay else (None, None)
    step = None if weight.step is None else max(1, weight.step * old_row // max(1, new_row))
    made = Weight(shape, weight.dtype, read, packed, step, weight.identity, importance, weight.rounding)
    return replace(made, costs=weight.costs) if rows_stay else made


def selected(weight: Weight, axis: int, indices: Array) -> Weight:
    """The entries of an axis at `indices`, in their order: a part, a reversal or a permutation. Rows stay packed."""
    shape = (*weight.shape[:axis], len(indices), *weight.shape[axis + 1 :])
    packed, importance = None, weight.importance if axis < len(shape) - 1 else None
    if weight.packed is not None and axis < len(shape) - 1:
        places = np.arange(math.prod(weight.shape[:-1])).reshape(weight.shape[:-1])
        packed = _packed_rows(weight.packed, places.take(indices, axis))
    if importance is not None and importance.ndim == 2 and axis == 0:
        importance = importance[indices]

    def read(start: int, stop: int) -> Array:
        return np.ascontiguousarray(weight.read(start, stop).take(indices, axis))

    picked = _picked(weight.read, indices) if axis == 0 else read
    return Weight(shape, weight.dtype, picked, packed, weight.step, None, importance, weight.rounding)


def rows_of(weight: Weight, start: int, stop: int) -> Weight:
    """Neighbouring rows, with what their roundings cost where that is known of each row."""
    costs = tuple(
        Cost(cost.rounding, float(cost.rows[start:stop].sum()), cost.rows[start:stop])
        for cost in weight.costs
        if cost.rows is not None
    )
    return replace(selected(weight, 0, np.arange(start, stop)), costs=costs)


def _picked(read: Read, indices: Array) -> Read:
    """Read rows by their place in `indices`: a few runs of neighbours one by one, else all that lies between them."""

    def pick(start: int, stop: int) -> Array:
        asked = indices[start:stop]
        if not len(asked):
            return read(0, 0)
        ends = [*(np.flatnonzero(np.diff(asked) != 1) + 1).tolist(), len(asked)]
        if len(ends) <= RUNS:
            runs = [
                read(int(asked[first]), int(asked[end - 1]) + 1) for first, end in zip([0, *ends], ends, strict=False)
            ]
            return runs[0] if len(runs) == 1 else np.concatenate(runs)
        lowest, highest = int(asked.min()), int(asked.max())
        rows: Array = read(lowest, highest + 1)[asked - lowest]
        return rows

    return pick


def mapped(
    function: Callable[..., Array], weights: Sequence[Weight], dtype: np.dtype[np.generic] | None = None
) -> Weight:
    """A function of the numbers of one or several weights of the same shape, each at its place.

    Raises ValueError when the shapes differ.
    """
    first = weights[0]
    if any(weight.shape != first.shape for weight in weights):
        raise ValueError(f"shapes {[list(weight.shape) for weight in weights]} differ")

    def read(start: int, stop: int) -> Array:
        return function(*(weight.read(start, stop) for weight in weights))

    return Weight(first.shape, first.dtype if dtype is None else dtype, read, step=_step(weights))
