"""Buffers in the memory of an NVIDIA GPU, which sessions bind by their address.

A buffer takes exactly its size and gives it back when nobody holds it any more: ONNX Runtime's own device arrays come
from an arena that grows by powers of two and gives nothing back, where a cache that grows would hold its size several
times. Copies stay on the GPU. Whatever is asked is done on return: the streams that sessions run on know nothing of
the one here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fmedge_runtimes.cuda import Cuda, DeviceMemory, Lines
from fmedge_runtimes.session import Array, Buffer


@dataclass(frozen=True, slots=True)
class CudaBuffer:
    """A buffer in device memory; `owner` keeps it alive."""

    owner: DeviceMemory
    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]

    @property
    def nbytes(self) -> int:
        """The size."""
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> CudaBuffer:
        """The rows start:stop, sharing memory."""
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        shape = (stop - start, *self.shape[1:])
        return CudaBuffer(self.owner, self.address + start * row_bytes, shape, self.dtype)


class CudaMemory:
    """The memory of one GPU; `session.Session` has what the methods do. `moved` counts bytes to and from the host."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.moved = 0

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> CudaBuffer:
        """A zeroed buffer. Raises MemoryError."""
        nbytes = math.prod(shape) * dtype.itemsize
        with self.cuda.turn():
            memory = self.cuda.allocate(nbytes)
            if nbytes:
                self.cuda.clear(memory.address, nbytes)
                self.cuda.synchronize()
        return CudaBuffer(memory, memory.address, shape, dtype)

    def copy(self, source: Buffer, target: Buffer, shape: tuple[int, ...]) -> None:
        """Copy the leading block of that shape."""
        with self.cuda.turn():
            for lines in block_copies(own(source), own(target), shape):
                self.cuda.copy(lines)
            self.cuda.synchronize()

    def read(self, buffer: Buffer, start: int, stop: int) -> Array:
        """The elements start:stop of a flattened buffer."""
        host = np.empty(stop - start, buffer.dtype)  # [stop - start]
        if host.nbytes:
            with self.cuda.turn():
                self.cuda.download(host.ctypes.data, own(buffer).address + start * host.itemsize, host.nbytes)
                self.cuda.synchronize()
        self.moved += host.nbytes
        return host

    def write(self, array: Array, buffer: Buffer) -> None:
        """Fill a buffer from an array of its shape."""
        array = np.ascontiguousarray(array, buffer.dtype)
        if array.nbytes:
            with self.cuda.turn():
                self.cuda.upload(own(buffer).address, array.ctypes.data, array.nbytes)
                self.cuda.synchronize()
        self.moved += array.nbytes

    def free(self) -> int | None:
        """Bytes that are free on the GPU."""
        with self.cuda.turn():
            return self.cuda.free_bytes()


def block_copies(source: CudaBuffer, target: CudaBuffer, shape: tuple[int, ...]) -> list[Lines]:
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
    for place in np.ndindex(*shape[:first]):
        starts = [
            buffer.address + sum(at * math.prod(buffer.shape[axis + 1 :]) for axis, at in enumerate(place)) * size
            for buffer in (source, target)
        ]
        found.append(Lines(starts[1], pitches[1], starts[0], pitches[0], width, height))
    return found


def own(buffer: Buffer) -> CudaBuffer:
    """The buffer, if it is one of a GPU. Raises TypeError."""
    if not isinstance(buffer, CudaBuffer):
        raise TypeError("the buffer is another backend's")
    return buffer
