"""Buffers in host memory: numpy arrays that a graph reads and writes in place."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fmedge_runtimes.memory import available_bytes
from fmedge_runtimes.session import Array, Buffer


@dataclass(frozen=True, slots=True)
class HostBuffer:
    """A buffer in host memory."""

    array: Array
    address: int = field(init=False)
    """Where the first element lies; asked for in every step, and slow to ask numpy for."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "address", int(self.array.ctypes.data))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape."""
        return self.array.shape

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """The element type."""
        return self.array.dtype

    def rows(self, start: int, stop: int) -> HostBuffer:
        """The rows start:stop, sharing memory."""
        return HostBuffer(self.array[start:stop])


class HostMemory:
    """The memory of the machine; see `session.Session` for what the methods do."""

    @staticmethod
    def allocate(shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> HostBuffer:
        """A zeroed buffer. Raises MemoryError."""
        return HostBuffer(np.zeros(shape, dtype))

    @staticmethod
    def copy(source: Buffer, target: Buffer, shape: tuple[int, ...]) -> None:
        """Copy the leading block of that shape."""
        block = tuple(map(slice, shape))
        _own(target)[block] = _own(source)[block]

    @staticmethod
    def read(buffer: Buffer, start: int, stop: int) -> Array:
        """The elements start:stop of a flattened buffer: a view, good until the next run."""
        return _own(buffer).reshape(-1)[start:stop]

    @staticmethod
    def write(array: Array, buffer: Buffer) -> None:
        """Fill a buffer from an array of its shape."""
        _own(buffer)[...] = array

    @staticmethod
    def free() -> int | None:
        """Bytes that can still be allocated; None where it cannot be told."""
        return available_bytes()


def _own(buffer: Buffer) -> Array:
    if not isinstance(buffer, HostBuffer):
        raise TypeError("the buffer is another backend's")
    return buffer.array
