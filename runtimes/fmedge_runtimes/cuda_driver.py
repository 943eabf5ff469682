"""The few functions of NVIDIA's driver that ONNX Runtime's Python interface has no counterpart of.

    driver = open_driver(Device("cuda", 1))
    address = driver.allocate(1 << 20)
    driver.free_bytes, driver.total_bytes, driver.name

ONNX Runtime's own device arrays come from an arena that grows by powers of two and gives nothing back; a cache that
grows would hold its size several times. The driver's library is there wherever a GPU works, under one name and with
one interface whatever the version of CUDA, and shares the context that ONNX Runtime uses (the device's primary one).

Copies on the driver's default stream are not ordered with the stream of a session: every function here returns when
what it does is done, and sessions return from a run when it is.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Mapping
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_void_p
from functools import cache
from types import MappingProxyType
from typing import Any

from fmedge_runtimes.device import Device
from fmedge_runtimes.errors import BackendError

OUT_OF_MEMORY = 2
"""CUDA_ERROR_OUT_OF_MEMORY."""
_DEVICE_MEMORY = 2
"""CU_MEMORYTYPE_DEVICE."""
_DEFAULT_STREAM = None

GPU_LOCK = threading.RLock()
"""Held by whoever uses a GPU of this process. While a graph is being captured an allocation or a copy by any other
thread would fail, and spoil the capture."""


class Copy2D(ctypes.Structure):
    """CUDA_MEMCPY2D: lines of the same length, each so many bytes behind the one before."""

    _fields_ = (
        ("source_x", c_size_t),
        ("source_y", c_size_t),
        ("source_type", c_uint),
        ("source_host", c_void_p),
        ("source_device", c_uint64),
        ("source_array", c_void_p),
        ("source_pitch", c_size_t),
        ("target_x", c_size_t),
        ("target_y", c_size_t),
        ("target_type", c_uint),
        ("target_host", c_void_p),
        ("target_device", c_uint64),
        ("target_array", c_void_p),
        ("target_pitch", c_size_t),
        ("width", c_size_t),
        ("height", c_size_t),
    )


SIGNATURES: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "cuInit": (c_uint,),
        "cuGetErrorName": (c_int, POINTER(c_char_p)),
        "cuDeviceGetCount": (POINTER(c_int),),
        "cuDeviceGet": (POINTER(c_int), c_int),
        "cuDeviceGetName": (c_void_p, c_int, c_int),
        "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
        "cuCtxSetCurrent": (c_void_p,),
        "cuMemGetInfo_v2": (POINTER(c_size_t), POINTER(c_size_t)),
        "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
        "cuMemFree_v2": (c_uint64,),
        "cuMemsetD8_v2": (c_uint64, c_ubyte, c_size_t),
        "cuMemcpyHtoD_v2": (c_uint64, c_void_p, c_size_t),
        "cuMemcpyDtoH_v2": (c_void_p, c_uint64, c_size_t),
        "cuMemcpy2DUnaligned_v2": (POINTER(Copy2D),),
        "cuStreamSynchronize": (c_void_p,),
    }
)
"""The functions that are used and their arguments; each returns an error code, 0 for none."""


def load_library() -> ctypes.CDLL:
    """The driver's library. Raises BackendError on a machine without one."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        raise BackendError(
            f"there is no NVIDIA driver on this machine ({name} cannot be loaded); use --device cpu."
        ) from error


@cache
def open_driver(device: Device) -> CudaDriver:
    """The driver's functions for one GPU. Raises BackendError when there is no such GPU."""
    return CudaDriver(load_library(), device)


class CudaDriver:
    """One GPU. Every method takes GPU_LOCK and makes the GPU current in its thread."""

    def __init__(self, library: Any, device: Device) -> None:  # noqa: ANN401 - a CDLL has no type for its functions
        self._functions = {name: getattr(library, name) for name in SIGNATURES}
        for name, function in self._functions.items():
            function.argtypes, function.restype = SIGNATURES[name], c_int
        self._context: c_void_p | None = None
        self._call("cuInit", 0)
        count = c_int()
        self._call("cuDeviceGetCount", count)
        if device.index >= count.value:
            there = "cuda" if count.value == 1 else f"cuda to cuda:{count.value - 1}"
            raise BackendError(
                f"there is no device {device}: the driver sees "
                + (
                    f"{count.value} GPU{'s' * (count.value > 1)}, {there}."
                    if count.value
                    else "no GPU; use --device cpu."
                )
            )
        handle, context, written = c_int(), c_void_p(), ctypes.create_string_buffer(256)
        self._call("cuDeviceGet", handle, device.index)
        self._call("cuDeviceGetName", written, len(written), handle.value)
        self._call("cuDevicePrimaryCtxRetain", context, handle.value)
        self._context = context
        self.name = written.value.decode("utf-8", "replace")
        """The GPU's name, as its maker has it."""

    def _call(self, function: str, *arguments: Any) -> None:  # noqa: ANN401 - as the function takes them
        """Call a function; what it returns through pointers are ctypes objects. Raises MemoryError, BackendError."""
        with GPU_LOCK:
            if self._context is not None:
                self._check("cuCtxSetCurrent", self._functions["cuCtxSetCurrent"](self._context))
            self._check(function, self._functions[function](*arguments))

    def _check(self, function: str, code: int) -> None:
        if code == OUT_OF_MEMORY:
            raise MemoryError(f"{function}: the GPU is out of memory")
        if code:
            name = c_char_p()
            self._functions["cuGetErrorName"](code, name)
            what = name.value.decode() if name.value else f"error {code}"
            raise BackendError(f"the GPU failed: {function} gave {what}.")

    @property
    def free_bytes(self) -> int:
        """Bytes that are free on the GPU."""
        return self._memory()[0]

    @property
    def total_bytes(self) -> int:
        """Bytes that the GPU has."""
        return self._memory()[1]

    def _memory(self) -> tuple[int, int]:
        free, total = c_size_t(), c_size_t()
        self._call("cuMemGetInfo_v2", free, total)
        return free.value, total.value

    def allocate(self, nbytes: int) -> int:
        """The address of so many bytes, at least one, all zero. Raises MemoryError."""
        address = c_uint64()
        with GPU_LOCK:
            self._call("cuMemAlloc_v2", address, nbytes)
            self._call("cuMemsetD8_v2", address.value, 0, nbytes)
            self._finish()
        return address.value

    def release(self, address: int) -> None:
        """Give the memory of an address back."""
        self._call("cuMemFree_v2", address)

    def write(self, host: int, address: int, nbytes: int) -> None:
        """Copy from the host to the GPU."""
        with GPU_LOCK:
            self._call("cuMemcpyHtoD_v2", address, host, nbytes)
            # Without pinned memory the last part of a copy may be on its way when the function returns.
            self._finish()

    def read(self, address: int, host: int, nbytes: int) -> None:
        """Copy from the GPU to the host."""
        self._call("cuMemcpyDtoH_v2", host, address, nbytes)

    def copy(self, copies: list[Copy2D]) -> None:
        """Copy inside the GPU."""
        with GPU_LOCK:
            for each in copies:
                self._call("cuMemcpy2DUnaligned_v2", each)
            self._finish()

    def _finish(self) -> None:
        self._call("cuStreamSynchronize", _DEFAULT_STREAM)


def lines_between(source: int, source_pitch: int, target: int, target_pitch: int, width: int, height: int) -> Copy2D:
    """A copy of `height` lines of `width` bytes between two addresses of the GPU."""
    return Copy2D(
        source_type=_DEVICE_MEMORY,
        source_device=source,
        source_pitch=source_pitch,
        target_type=_DEVICE_MEMORY,
        target_device=target,
        target_pitch=target_pitch,
        width=width,
        height=height,
    )
