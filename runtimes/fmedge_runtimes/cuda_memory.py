"""Buffers in the memory of an NVIDIA GPU, which sessions bind by their address.

A buffer takes exactly its size and gives it back when nobody holds it any more. Copies stay on the GPU.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from itertools import product

import numpy as np

from fmedge_runtimes.cuda_driver import Copy2D, CudaDriver, lines_between
from fmedge_runtimes.session import Array, Buffer


class Allocation:
    """Memory of the GPU, until nobody holds it."""

    __slots__ = ("__weakref__", "address")

    def __init__(self, driver: CudaDriver, nbytes: int) -> None:
        self.address = driver.allocate(max(nbytes, 1))
        weakref.finalize(self, driver.release, self.address).atexit = False


@dataclass(frozen=True, slots=True)
class CudaBuffer:
    """A buffer in device memory; `owner` keeps it alive."""

    owner: Allocation
    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]

    def rows(self, start: int, stop: int) -> CudaBuffer:
        """The rows start:stop, sharing memory."""
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        shape = (stop - start, *self.shape[1:])
        return CudaBuffer(self.owner, self.address + start * row_bytes, shape, self.dtype)


class CudaMemory:
    """The memory of one GPU; `session.Session` has what the methods do. `moved` counts bytes to and from the host."""

    def __init__(self, driver: CudaDriver) -> None:
        self.driver = driver
        self.moved = 0

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> CudaBuffer:
        """A zeroed buffer. Raises MemoryError."""
        owner = Allocation(self.driver, math.prod(shape) * dtype.itemsize)
        return CudaBuffer(owner, owner.address, shape, dtype)

    def copy(self, source: Buffer, target: Buffer, shape: tuple[int, ...]) -> None:
        """Copy the leading block of that shape."""
        self.driver.copy(block_copies(_own(source), _own(target), shape))

    def read(self, buffer: Buffer, start: int, stop: int) -> Array:
        """The elements start:stop of a flattened buffer."""
        host = np.empty(stop - start, buffer.dtype)  # [stop - start]
        self.driver.read(_own(buffer).address + start * host.itemsize, host.ctypes.data, host.nbytes)
        self.moved += host.nbytes
        return host

    def write(self, array: Array, buffer: Buffer) -> None:
        """Fill a buffer from an array of its shape."""
        array = np.ascontiguousarray(array, buffer.dtype)
        self.driver.write(array.ctypes.data, _own(buffer).address, array.nbytes)
        self.moved += array.nbytes

    def free(self) -> int | None:
        """Bytes that are free on the GPU."""
        return self.driver.free_bytes


def block_copies(source: CudaBuffer, target: CudaBuffer, shape: tuple[int, ...]) -> list[Copy2D]:
    """The copies of the leading block of that shape, in as few as the two layouts allow."""
    if not math.prod(shape):
        return []
    sizes = tuple(zip(shape, source.shape, target.shape, strict=True))
    whole = [len(set(size)) == 1 for size in sizes]
    # Axes from `line` on lie together in both buffers; those from `first` to it are lines at one distance.
    line = len(shape) - 1
    while line > 0 and whole[line]:
        line -= 1
    first = max(line - 1, 0)
    while first > 0 and whole[first]:
        first -= 1
    size = source.dtype.itemsize
    pitches = [math.prod(buffer.shape[line:]) * size for buffer in (source, target)]
    width, height = math.prod(shape[line:]) * size, math.prod(shape[first:line])
    found = []
    for place in product(*map(range, shape[:first])):
        starts = [
            buffer.address + sum(at * math.prod(buffer.shape[axis + 1 :]) for axis, at in enumerate(place)) * size
            for buffer in (source, target)
        ]
        found.append(lines_between(starts[0], pitches[0], starts[1], pitches[1], width, height))
    return found


def _own(buffer: Buffer) -> CudaBuffer:
    if not isinstance(buffer, CudaBuffer):
        raise TypeError("the buffer is another backend's")
    return buffer
