"""CUDA's driver on a machine without one: device memory is host memory, and the stream runs at once.

What the driver would answer with a crash raises AssertionError here: an address outside its memory, memory that was
given back, a thread without a context, a call that a capture does not allow.
"""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from strict_double import StrictModule, read_inventory

GARBAGE = 0xA5
"""What fresh memory holds."""
ALIGNMENT = 256
CONTEXT = 7
"""That of the first device."""


class Handle:
    """A stream, a context, a graph."""

    def __init__(self, number: int, what: Any = None) -> None:
        self.number = number
        self.what = what

    def __int__(self) -> int:
        return self.number


class Block:
    """CUDA_MEMCPY2D."""

    def __init__(self) -> None:
        for name in ("srcXInBytes", "srcY", "dstXInBytes", "dstY", "srcPitch", "dstPitch", "srcDevice", "dstDevice"):
            setattr(self, name, 0)


@dataclass
class FakeCuda:
    """The state behind the functions of the driver."""

    devices: int = 1
    name: str = "Orin"
    """Of the first device; another has its number behind it."""
    capability: tuple[int, int] = (8, 7)
    integrated: bool = False
    total: int = 1 << 30
    no_capture: bool = False
    """Captures end with an error, as an engine may have them."""
    library: bool = True
    """Whether there is a libcuda."""
    started: bool = False
    memory: dict[int, tuple[int, Any]] = field(default_factory=dict)
    """By address: size and the array that holds it."""
    hosts: dict[int, tuple[int, Any]] = field(default_factory=dict)
    capturing: list[Any] | None = None
    copies: list[tuple[str, int]] = field(default_factory=list)
    launches: int = 0
    live_graphs: int = 0
    _threads: Any = field(default_factory=threading.local)
    _lock: Any = field(default_factory=threading.RLock)

    def module(self, inventory: str = "cuda-12.9.4") -> StrictModule:
        """The module `cuda.bindings.driver`."""
        plays = {name: getattr(self, name) for name in dir(self) if name[:2] == "cu" and name[2].isupper()}
        made = StrictModule(read_inventory(inventory), {**plays, "CUDA_MEMCPY2D": Block})
        self._module = made
        return made

    @property
    def allocated(self) -> int:
        """Bytes of device memory that somebody holds."""
        return sum(size for size, _ in self.memory.values())

    @property
    def moved(self) -> int:
        """Bytes that went between the host and the device."""
        return sum(nbytes for kind, nbytes in self.copies if kind.startswith(("up", "down")))

    def holds(self, address: int, nbytes: int) -> bool:
        """Whether all of it lies in one allocation."""
        spaces = (*self.memory.items(), *self.hosts.items())
        return any(start <= address and address + nbytes <= start + size for start, (size, _) in spaces)

    def check(self, address: int, nbytes: int) -> None:
        """Assert that all of it lies in one allocation."""
        assert self.holds(address, nbytes), f"{nbytes} bytes at {address:#x} are nobody's"

    def do(self, work: Any) -> None:
        """Run what is put on the stream, or keep it for the graph that is being captured."""
        self.current()
        if self.capturing is not None:
            self.capturing.append(work)
        else:
            work()

    def current(self) -> None:
        """Assert that the calling thread has a context."""
        assert getattr(self._threads, "context", None) is not None, "this thread has no CUDA context"

    def _code(self, name: str = "CUDA_SUCCESS") -> Any:
        return getattr(self._module.CUresult, name)

    def cuInit(self, Flags):
        if not self.library:
            raise RuntimeError('"cuda" is an NVIDIA driver library and can only be found via system search.')
        if not self.devices:
            return (self._code("CUDA_ERROR_NO_DEVICE"),)
        self.started = True
        return (self._code(),)

    def cuGetErrorName(self, error):
        return self._code(), error.name.encode()

    def cuDeviceGetCount(self):
        return self._code(), self.devices

    def cuDeviceGet(self, ordinal):
        return self._code(), Handle(ordinal)

    def cuDeviceGetName(self, length, dev):
        name = f"{self.name} {int(dev)}" if int(dev) else self.name
        return self._code(), name.encode().ljust(length, b"\0")

    def cuDeviceGetAttribute(self, attrib, dev):
        names = self._module.CUdevice_attribute
        known = {
            names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: self.capability[0],
            names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: self.capability[1],
            names.CU_DEVICE_ATTRIBUTE_INTEGRATED: int(self.integrated),
        }
        return self._code(), known[attrib]

    def cuDeviceTotalMem(self, dev):
        return self._code(), self.total

    def cuDevicePrimaryCtxRetain(self, dev):
        return self._code(), Handle(CONTEXT + int(dev))

    def cuCtxSetCurrent(self, ctx):
        assert int(ctx) in range(CONTEXT, CONTEXT + self.devices)
        self._threads.context = ctx
        return (self._code(),)

    def cuStreamCreate(self, Flags):
        self.current()
        return self._code(), Handle(4242)

    def cuStreamSynchronize(self, hStream):
        self.current()
        assert self.capturing is None, "a capture does not allow to wait"
        return (self._code(),)

    def cuMemGetInfo(self):
        self.current()
        return self._code(), self.total - self.allocated, self.total

    def _take(self, space, nbytes):
        self.current()
        assert self.capturing is None, "a capture does not allow to allocate"
        held = np.full(nbytes + ALIGNMENT, GARBAGE, np.uint8)
        address = -(-held.ctypes.data // ALIGNMENT) * ALIGNMENT
        with self._lock:
            space[address] = nbytes, held
        return self._code(), address

    def cuMemAlloc(self, bytesize):
        if self.allocated + bytesize > self.total:
            return self._code("CUDA_ERROR_OUT_OF_MEMORY"), None
        return self._take(self.memory, bytesize)

    def cuMemFree(self, dptr):
        self.current()
        del self.memory[dptr]
        return (self._code(),)

    def cuMemHostAlloc(self, bytesize, Flags):
        assert Flags & self._module.CU_MEMHOSTALLOC_DEVICEMAP
        return self._take(self.hosts, bytesize)

    def cuMemHostGetDevicePointer(self, p, Flags):
        assert p in self.hosts and Flags == 0
        return self._code(), p

    def cuMemFreeHost(self, p):
        self.current()
        del self.hosts[p]
        return (self._code(),)

    def _copy(self, kind, target, source, nbytes, host=None):
        """Of the host's memory, what is not pinned is copied only when the stream does nothing else."""
        if host is not None and not self.holds(host, nbytes):
            assert self.capturing is None, "a capture keeps the address of memory that is not pinned"
            kind = f"{kind} from pages"
        for address in {target, source} - {host}:
            self.check(address, nbytes)
        self.copies.append((kind, nbytes))
        self.do(lambda: ctypes.memmove(target, source, nbytes))
        return (self._code(),)

    def cuMemcpyHtoDAsync(self, dstDevice, srcHost, ByteCount, hStream):
        assert dstDevice not in self.hosts
        return self._copy("up", dstDevice, srcHost, ByteCount, srcHost)

    def cuMemcpyDtoHAsync(self, dstHost, srcDevice, ByteCount, hStream):
        assert srcDevice not in self.hosts
        return self._copy("down", dstHost, srcDevice, ByteCount, dstHost)

    def cuMemcpyDtoDAsync(self, dstDevice, srcDevice, ByteCount, hStream):
        return self._copy("inside", dstDevice, srcDevice, ByteCount)

    def cuMemcpy2DAsync(self, pCopy, hStream):
        kind = self._module.CUmemorytype.CU_MEMORYTYPE_DEVICE
        assert pCopy.srcMemoryType == pCopy.dstMemoryType == kind
        assert min(pCopy.srcPitch, pCopy.dstPitch) >= pCopy.WidthInBytes
        for line in range(pCopy.Height):
            target = pCopy.dstDevice + line * pCopy.dstPitch
            self._copy("line", target, pCopy.srcDevice + line * pCopy.srcPitch, pCopy.WidthInBytes)
        return (self._code(),)

    def cuMemsetD8Async(self, dstDevice, uc, N, hStream):
        self.check(dstDevice, N)
        self.do(lambda: ctypes.memset(dstDevice, uc, N))
        return (self._code(),)

    def cuStreamBeginCapture(self, hStream, mode):
        self.current()
        assert self.capturing is None
        assert mode == self._module.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self.capturing = []
        return (self._code(),)

    def cuStreamEndCapture(self, hStream):
        self.current()
        work, self.capturing = self.capturing, None
        if self.no_capture:
            return self._code("CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"), None
        return self._code(), Handle(1, work)

    def cuGraphInstantiate(self, hGraph, flags):
        self.live_graphs += 1
        return self._code(), Handle(2, list(hGraph.what))

    def cuGraphDestroy(self, hGraph):
        hGraph.what = None
        return (self._code(),)

    def cuGraphExecDestroy(self, hGraphExec):
        self.live_graphs -= 1
        hGraphExec.what = None
        return (self._code(),)

    def cuGraphLaunch(self, hGraphExec, hStream):
        self.current()
        self.launches += 1
        for work in hGraphExec.what:
            work()
        return (self._code(),)
