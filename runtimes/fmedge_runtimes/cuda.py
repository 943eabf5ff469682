"""CUDA through its driver API, as far as sessions need it: one device, one stream, memory, copies, captured graphs.

    cuda = open_cuda(Device("cuda", 1))
    cuda.device.name, cuda.device.capability
    with cuda.turn():
        memory = cuda.allocate(1 << 20)
        cuda.upload(memory.address, array.ctypes.data, array.nbytes)
        cuda.synchronize()

CUDA's Python bindings (cuda-bindings, a part of cuda-python) are imported here and nowhere else. Only libcuda is
needed, which comes with the driver and is the same whatever the version of CUDA. ONNX Runtime and TensorRT work in the
context that is used here, the device's primary one. What is queued on the stream happens in order; nothing else is
promised before `synchronize`, neither to other streams. Evidence: the calls are checked against the names and arguments
of the real module; none has run on a GPU (docs/evidence.md).
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from fmedge_runtimes.device import Device
from fmedge_runtimes.errors import BackendError
from fmedge_runtimes.memory import available_bytes

OUT_OF_MEMORY = 2
"""CUDA_ERROR_OUT_OF_MEMORY."""
EXTRAS: Mapping[str, str] = MappingProxyType({"cuda": "gpu", "tensorrt": "tensorrt", "rtx": "rtx"})
"""By kind of device: the extra of fmedge that holds the bindings."""

GPU_LOCK = threading.RLock()
"""Held by whoever uses a GPU of this process. While ONNX Runtime captures a graph, an allocation or a copy by any other
thread would fail, and spoil the capture."""


@dataclass(frozen=True, slots=True)
class CudaDevice:
    """What the driver says of a GPU."""

    name: str
    capability: tuple[int, int]
    integrated: bool
    """It shares the machine's memory, as on a Jetson."""
    total: int
    """Bytes of its memory."""


@dataclass(frozen=True, slots=True)
class Lines:
    """A copy inside the device: lines of the same length, at equal distances."""

    target: int
    """The address of the first."""
    target_pitch: int
    """Bytes from line to line."""
    source: int
    source_pitch: int
    width: int
    """Bytes of a line."""
    count: int


class Cuda:
    """A GPU, with its primary context and one stream; `open_cuda` makes it. Use it in `turn` only."""

    def __init__(self, driver: Any, device: Device) -> None:  # noqa: ANN401 - cuda-python is imported only where it is used
        self._driver = driver
        try:
            self._call("cuInit", 0)
            count = int(self._call("cuDeviceGetCount"))
        except (BackendError, RuntimeError) as error:  # the module raises when there is no libcuda
            raise BackendError(f"there is no CUDA device that can be used: {error}; use --device cpu.") from error
        if count == 0:
            raise BackendError("there is no CUDA device: the driver works, but sees no GPU; use --device cpu.")
        if device.index >= count:
            there = "1 GPU, cuda" if count == 1 else f"{count} GPUs, cuda to cuda:{count - 1}"
            raise BackendError(f"there is no device {device}: the driver sees {there}.")
        self._handle = self._call("cuDeviceGet", device.index)
        self.device = self._describe()
        self._context = self._call("cuDevicePrimaryCtxRetain", self._handle)
        self.activate()
        self._stream = self._call("cuStreamCreate", driver.CUstream_flags.CU_STREAM_NON_BLOCKING.value)

    def _call(self, name: str, *arguments: Any) -> Any:  # noqa: ANN401 - as the driver's functions
        """What a function of the driver gives, behind its error code. Raises BackendError, MemoryError."""
        code, *values = getattr(self._driver, name)(*arguments)
        if int(code) == OUT_OF_MEMORY:
            raise MemoryError(f"{name}: the GPU has no memory left")
        if int(code):
            raise BackendError(f"CUDA's {name} failed: {self._name(code)}; check the NVIDIA driver.")
        return values[0] if len(values) == 1 else tuple(values) or None

    def _name(self, code: Any) -> str:  # noqa: ANN401 - a CUresult
        _, name = self._driver.cuGetErrorName(code)
        return bytes(name).decode() if name else str(int(code))

    def _describe(self) -> CudaDevice:
        names = self._driver.CUdevice_attribute

        def attribute(name: str) -> int:
            return int(self._call("cuDeviceGetAttribute", getattr(names, f"CU_DEVICE_ATTRIBUTE_{name}"), self._handle))

        return CudaDevice(
            name=bytes(self._call("cuDeviceGetName", 128, self._handle)).split(b"\0")[0].decode(),
            capability=(attribute("COMPUTE_CAPABILITY_MAJOR"), attribute("COMPUTE_CAPABILITY_MINOR")),
            integrated=bool(attribute("INTEGRATED")),
            total=int(self._call("cuDeviceTotalMem", self._handle)),
        )

    def activate(self) -> None:
        """Make this the GPU of the calling thread: sessions run in threads of their own."""
        self._call("cuCtxSetCurrent", self._context)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """The GPU for the calling thread alone, until the end of the block."""
        with GPU_LOCK:
            self.activate()
            yield

    @property
    def stream(self) -> int:
        """The stream's handle, as TensorRT takes it."""
        return int(self._stream)

    def free_bytes(self) -> int:
        """Bytes that are free on the device; of shared memory, no more than the machine says that it can spare."""
        free = int(self._call("cuMemGetInfo")[0])
        spare = available_bytes() if self.device.integrated else None
        return free if spare is None else min(free, spare)

    def allocate(self, nbytes: int) -> DeviceMemory:
        """Memory on the device, with nothing in particular in it. Raises MemoryError."""
        return DeviceMemory(self, int(self._call("cuMemAlloc", max(nbytes, 1))), nbytes)

    def allocate_pinned(self, nbytes: int) -> PinnedMemory:
        """Host memory that the GPU can reach. Raises MemoryError."""
        driver = self._driver
        flags = driver.CU_MEMHOSTALLOC_PORTABLE | driver.CU_MEMHOSTALLOC_DEVICEMAP
        host = int(self._call("cuMemHostAlloc", max(nbytes, 1), flags))
        return PinnedMemory(self, host, int(self._call("cuMemHostGetDevicePointer", host, 0)), nbytes)

    def release(self, function: str, address: int) -> None:
        """Give memory back; when the program ends, the driver may be gone already."""
        with contextlib.suppress(BackendError), self.turn():
            self._call(function, address)

    def clear(self, address: int, nbytes: int) -> None:
        """Queue the zeroing of memory."""
        self._call("cuMemsetD8Async", address, 0, nbytes, self._stream)

    def upload(self, device: int, host: int, nbytes: int) -> None:
        """Queue a copy from the host to the device; from memory that is not pinned only together with a
        `synchronize`."""
        self._call("cuMemcpyHtoDAsync", device, host, nbytes, self._stream)

    def download(self, host: int, device: int, nbytes: int) -> None:
        """Queue a copy from the device to the host; the same holds."""
        self._call("cuMemcpyDtoHAsync", host, device, nbytes, self._stream)

    def copy(self, lines: Lines) -> None:
        """Queue a copy inside the device."""
        if lines.count == 1:
            self._call("cuMemcpyDtoDAsync", lines.target, lines.source, lines.width, self._stream)
            return
        kind = self._driver.CUmemorytype.CU_MEMORYTYPE_DEVICE
        block = self._driver.CUDA_MEMCPY2D()
        block.dstMemoryType, block.srcMemoryType = kind, kind
        block.dstDevice, block.dstPitch = lines.target, lines.target_pitch
        block.srcDevice, block.srcPitch = lines.source, lines.source_pitch
        block.WidthInBytes, block.Height = lines.width, lines.count
        self._call("cuMemcpy2DAsync", block, self._stream)

    def synchronize(self) -> None:
        """Wait for all that is queued. Raises BackendError if something of it failed."""
        self._call("cuStreamSynchronize", self._stream)

    def capture(self, queue: Callable[[], None]) -> CapturedGraph:
        """What `queue` puts on the stream, to be launched again and again; nothing runs now. Raises BackendError."""
        mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", self._stream, mode)
        try:
            queue()
        except BaseException:
            # The stream must leave its capture, whatever became of it.
            with contextlib.suppress(BackendError):
                self._call("cuGraphDestroy", self._call("cuStreamEndCapture", self._stream))
            raise
        graph = self._call("cuStreamEndCapture", self._stream)
        try:
            return CapturedGraph(self, self._call("cuGraphInstantiate", graph, 0))
        finally:
            self._call("cuGraphDestroy", graph)

    def launch(self, handle: Any) -> None:  # noqa: ANN401 - a CUgraphExec
        """Queue a captured graph."""
        self._call("cuGraphLaunch", handle, self._stream)


class DeviceMemory:
    """Memory on the device, given back when nobody holds it any more."""

    def __init__(self, cuda: Cuda, address: int, nbytes: int) -> None:
        self.address = address
        self.nbytes = nbytes
        self._end = weakref.finalize(self, cuda.release, "cuMemFree", address)
        self._end.atexit = False


class PinnedMemory:
    """Host memory that the GPU reaches at `device`; on integrated GPUs without a copy."""

    def __init__(self, cuda: Cuda, host: int, device: int, nbytes: int) -> None:
        self.address = host
        self.device = device
        self.nbytes = nbytes
        self.bytes: npt.NDArray[np.uint8] = np.ctypeslib.as_array(
            (ctypes.c_uint8 * max(nbytes, 1)).from_address(host)
        )  # [nbytes]
        self._end = weakref.finalize(self, cuda.release, "cuMemFreeHost", host)
        self._end.atexit = False


class CapturedGraph:
    """A captured piece of work, destroyed when nobody holds it any more."""

    def __init__(self, cuda: Cuda, handle: Any) -> None:  # noqa: ANN401 - a CUgraphExec
        self._cuda = cuda
        self._handle = handle
        self._end = weakref.finalize(self, cuda.release, "cuGraphExecDestroy", handle)
        self._end.atexit = False

    def launch(self) -> None:
        """Queue it."""
        self._cuda.launch(self._handle)


@cache
def open_cuda(device: Device) -> Cuda:
    """A GPU, the same for all sessions. Raises BackendError when cuda-bindings, the driver or the GPU is missing."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise BackendError(
            f"cuda-bindings is not installed, which the device {device} needs: "
            f"pip install 'fmedge[{EXTRAS[device.kind]}]' (on JetPack 6 with 'cuda-bindings<13')."
        ) from error
    return Cuda(driver, device)
