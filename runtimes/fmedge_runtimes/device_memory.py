"""What to say when a GPU's memory does not suffice."""

from __future__ import annotations

import re

from fmedge_runtimes.cuda import Cuda
from fmedge_runtimes.device import Device
from fmedge_runtimes.errors import BackendError, DeviceMemoryError

_REQUESTED = re.compile(r"(?:requested buffer of size|bytes of memory|allocate) (\d+)")
_MARKS = ("out of memory", "Failed to allocate memory", "Available memory of", "ALLOC_FAILED", "bad allocation")
"""How ONNX Runtime, CUDA and the libraries over it say that there is no memory."""


def means_no_memory(error: Exception) -> bool:
    """Whether an error of ONNX Runtime, or of Python, says that there was no memory."""
    return isinstance(error, MemoryError) or any(mark in str(error) for mark in _MARKS)


def out_of_memory(what: str, device: Device, cuda: Cuda, error: Exception) -> BackendError:
    """The error to raise when a GPU has no memory for something."""
    asked = _REQUESTED.search(str(error))
    needed = f"{int(asked[1]) / 2**20:.0f} MiB were asked for and " if asked else ""
    with cuda.turn():
        free, total = cuda.free_bytes() / 2**20, cuda.device.total / 2**20
    return DeviceMemoryError(
        f"{what}: {device} ({cuda.device.name}) is out of memory: {needed}{free:.0f} MiB of {total:.0f} MiB are free."
    )
