"""The ONNX Runtime backend: CPU and CUDA.

On the CPU a buffer is a numpy array that the session reads and writes in place. On CUDA it is memory of the GPU, bound
by its address (cuda_memory.py). Evidence: the CPU path runs in every test; the CUDA path runs in tests over host memory
that plays a GPU, and has not run on one yet (docs/evidence.md).
"""

from __future__ import annotations

import logging
import math
import mmap
import platform
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from fmedge_runtimes.cuda import GPU_LOCK, open_cuda
from fmedge_runtimes.cuda_graphs import CudaGraphs, RecordedSteps
from fmedge_runtimes.cuda_memory import CudaBuffer, CudaMemory
from fmedge_runtimes.device import Device, parse_device
from fmedge_runtimes.device_memory import means_no_memory, out_of_memory
from fmedge_runtimes.errors import BackendError
from fmedge_runtimes.host_memory import HostBuffer, HostMemory
from fmedge_runtimes.onnxruntime_binding import NOT_CAPTURED, BoundGraph, run_options
from fmedge_runtimes.session import Array, Buffer, TensorSpec

LOG = logging.getLogger("fmedge")
PROVIDERS = MappingProxyType({"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"})
"""By kind of device."""
CONVOLUTION = b'"\x04Conv'
"""`op_type: "Conv"` of a NodeProto, as protobuf writes it: field 4, of 4 bytes."""
CPUINFO = Path("/proc/cpuinfo")
DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(bool)": "bool",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
}


class Memory(Protocol):
    """The memory of a device; `session.Session` has what the methods do."""

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> HostBuffer | CudaBuffer: ...
    def copy(self, source: Buffer, target: Buffer, shape: tuple[int, ...]) -> None: ...
    def read(self, buffer: Buffer, start: int, stop: int) -> Array: ...
    def write(self, array: Array, buffer: Buffer) -> None: ...
    def free(self) -> int | None: ...


class OnnxRuntimeSession:
    """A graph opened in ONNX Runtime; see `session.Session` for the contract.

    With `cuda_graphs` a GPU records the steps of shapes that come often, and replays them.

    Raises BackendError when ONNX Runtime is not installed, lacks the provider or refuses the graph, or the device is
    not there; DeviceMemoryError when the weights do not fit.
    """

    def __init__(self, graph: Path, device: str, threads: int | None, cuda_graphs: bool = False) -> None:
        self.device = parse_device(device)
        self._ort = ort = _import_onnxruntime(self.device)
        # Before the provider, whose message would say less of a GPU that is not there.
        on_gpu = CudaMemory(open_cuda(self.device)) if self.device.kind == "cuda" else None
        self._memory: Memory = HostMemory() if on_gpu is None else on_gpu
        options = ort.SessionOptions()
        # What ONNX Runtime would log of an error, its exception says.
        options.log_severity_level = 4
        # Where ONNX Runtime joins DequantizeLinear and MatMul, activations are not rounded to int8.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        if _int8_saturates():
            options.add_session_config_entry("session.x64quantprecision", "1")
        if threads is not None:
            options.intra_op_num_threads = threads
        if on_gpu is not None:
            # What kernels keep in a form of their own goes back to the driver, and is not held twice.
            options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        self.graph: Any = None
        """The session of ONNX Runtime."""
        self._graphs: CudaGraphs | None = None
        if cuda_graphs and on_gpu is not None:
            # Refused for a graph with nodes that the GPU does not run, which is opened without.
            with suppress(Exception):
                self.graph = self._open(graph, options, {"enable_cuda_graph": "1"})
                self._graphs = CudaGraphs(on_gpu)
        try:
            self.graph = self.graph or self._open(graph, options, {})
        except Exception as error:
            raise self.failure(f"ONNX Runtime {ort.__version__} cannot open {graph}", error) from error
        provider = PROVIDERS[self.device.kind]
        if provider not in self.graph.get_providers():
            raise BackendError(f"{provider} could not start; check the NVIDIA driver and the CUDA libraries.")
        self.inputs = tuple(_spec(item) for item in self.graph.get_inputs())
        self.outputs = tuple(_spec(item) for item in self.graph.get_outputs())
        # The CUDA kernel wants windows of exactly their length (GroupQueryAttention, sliding_window_cache).
        self.window_slack = self.device.kind == "cpu"
        # Without an id ONNX Runtime would record the first shape that comes.
        self.eager = None if self._graphs is None else run_options(ort, NOT_CAPTURED)
        """Options for steps that are not recorded."""

    @property
    def captures(self) -> bool:
        """Whether steady steps are recorded and replayed."""
        return self._graphs is not None

    @property
    def moved(self) -> int:
        """Bytes that went between host and GPU so far; 0 on the CPU."""
        return self._memory.moved if isinstance(self._memory, CudaMemory) else 0

    def _open(self, graph: Path, options: Any, more: Mapping[str, str]) -> Any:  # noqa: ANN401 - ONNX Runtime's own
        provider: Any = PROVIDERS[self.device.kind]
        if self.device.kind == "cuda":
            # The arena holds weights and the working memory of steps; growing by powers of two it would hold more.
            settings = {"device_id": str(self.device.index), "arena_extend_strategy": "kSameAsRequested", **more}
            provider = (provider, settings)
        disabled = [] if _has_convolutions(graph) else ["NchwcTransformer"]
        with self.turn():
            return self._ort.InferenceSession(str(graph), options, providers=[provider], disabled_optimizers=disabled)

    def turn(self) -> AbstractContextManager[object]:
        """What to hold while the graph runs."""
        return GPU_LOCK if self.device.kind == "cuda" else nullcontext()

    def failure(self, what: str, error: Exception) -> BackendError:
        """The error to raise for one of ONNX Runtime's."""
        if isinstance(self._memory, CudaMemory) and means_no_memory(error):
            return out_of_memory(what, self.device, self._memory.cuda, error)
        return BackendError(f"{what}: {error}")

    def recorded(self, bound: tuple[Mapping[str, Buffer], Mapping[str, Buffer]]) -> RecordedSteps | None:
        """A record of the steps with these inputs and outputs bound; None where steps are not recorded."""
        return None if self._graphs is None else RecordedSteps(self._ort, self.graph, self.device, self._graphs, bound)

    def stop_recording(self) -> None:
        """Run all steps as they are from now on."""
        self._graphs = None

    def count(self, *named: Mapping[str, Array | Buffer]) -> None:
        """Count the host arrays of a step as moved, if it ran on a GPU."""
        if isinstance(self._memory, CudaMemory):
            arrays = (array for each in named for array in each.values() if isinstance(array, np.ndarray))
            self._memory.moved += sum(array.nbytes for array in arrays)

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> Buffer:
        """A zeroed buffer. Raises MemoryError."""
        return self._memory.allocate(shape, dtype)

    def free_memory(self) -> int | None:
        """What the machine, or the GPU, has free."""
        return self._memory.free()

    def copy(self, source: Buffer, target: Buffer, shape: tuple[int, ...] | None = None) -> None:
        """Copy the leading block of that shape, or the one that both buffers have in common."""
        self._memory.copy(source, target, shape or tuple(map(min, source.shape, target.shape)))

    def read(self, buffer: Buffer, start: int = 0, stop: int | None = None) -> Array:
        """The elements start:stop of a flattened buffer, on the host."""
        return self._memory.read(buffer, start, math.prod(buffer.shape) if stop is None else stop)

    def bind(self, feeds: Mapping[str, Buffer], results: Mapping[str, Buffer]) -> OnnxRuntimeBinding:
        """Bind inputs and outputs to buffers that stay where they are."""
        if self.graph is None:
            raise BackendError("the session is closed; load the model again.")
        return OnnxRuntimeBinding(self, feeds, results)

    def run(self, feeds: Mapping[str, Array | Buffer], results: Mapping[str, Array | Buffer]) -> dict[str, Array]:
        """Run the graph once; see `Session.run`."""
        returned = [item.name for item in self.outputs if item.name not in results]
        binding = self.bind(_buffers(feeds), _buffers(results))
        outputs = binding.run(_arrays(feeds), _arrays(results), returned)
        return dict(zip(returned, outputs, strict=True))

    def close(self) -> None:
        """Give the session's memory back."""
        self.graph = self._graphs = None


class OnnxRuntimeBinding:
    """A session with its buffers bound; see `session.Binding`."""

    def __init__(self, session: OnnxRuntimeSession, feeds: Mapping[str, Buffer], results: Mapping[str, Buffer]) -> None:
        self._session = session
        self._graph = BoundGraph(session.graph, session.device, feeds, results)
        self._recorded = session.recorded((feeds, results))

    def run(
        self,
        feeds: Mapping[str, Array],
        results: Mapping[str, Array | Buffer],
        returned: Sequence[str] = (),
        *,
        steady: bool = False,
    ) -> list[Array]:
        """Run the graph once; see `session.Binding.run`. ONNX Runtime makes the memory of the outputs in `returned`."""
        with self._session.turn():
            if steady and self._session.captures and self._replay(feeds, results):
                return []
            try:
                self._graph.give(feeds)
                self._graph.take(results, returned)
                self._graph.run(self._session.eager)
                self._session.count(feeds, results)
                return self._graph.last(len(returned))
            except Exception as error:
                raise self._session.failure("ONNX Runtime failed", error) from error

    def _replay(self, feeds: Mapping[str, Array], results: Mapping[str, Array | Buffer]) -> bool:
        """Run the recorded step, if there is one; whether there was, and it did."""
        assert self._recorded is not None
        try:
            step = self._recorded.step(feeds, results)
            if step is None:
                return False
            step.run(feeds, results)
        except Exception as error:
            # A steady step may run twice, so it can go on as it would without a record.
            self._session.stop_recording()
            LOG.warning("a step could not be recorded or replayed as a CUDA graph, all run one by one now: %s", error)
            return False
        return True


def _import_onnxruntime(device: Device) -> Any:  # noqa: ANN401 - a module
    """ONNX Runtime with the provider of a device. Raises BackendError."""
    if device.kind not in PROVIDERS:
        raise BackendError(f"ONNX Runtime has no device {device}; choose cpu or cuda.")
    try:
        import onnxruntime
    except ImportError as error:
        extra = "gpu" if device.kind == "cuda" else "cpu"
        how = f"pip install 'fmedge[{extra}]'"
        if sys.version_info < (3, 11):
            how = f"its wheels need Python 3.11 or newer, and this is 3.{sys.version_info[1]}; engines run without it"
        raise BackendError(f"ONNX Runtime is not installed: {how}.") from error
    provider = PROVIDERS[device.kind]
    if provider not in onnxruntime.get_available_providers():
        raise BackendError(
            f"the installed onnxruntime has no {provider}: pip uninstall onnxruntime, pip install 'fmedge[gpu]'."
        )
    if device.kind == "cuda":
        # The CUDA libraries of pip's nvidia packages, where there are any. It prints what it does not find.
        with redirect_stdout(sys.stderr):
            onnxruntime.preload_dlls()
    return onnxruntime


def _buffers(named: Mapping[str, Array | Buffer]) -> dict[str, Buffer]:
    return {name: value for name, value in named.items() if not isinstance(value, np.ndarray)}


def _arrays(named: Mapping[str, Array | Buffer]) -> dict[str, Array]:
    return {name: value for name, value in named.items() if isinstance(value, np.ndarray)}


def _has_convolutions(graph: Path) -> bool:
    """Whether a node of a graph is a convolution, or something in the file looks like one.

    Only their channels does NchwcTransformer lay out anew, and ONNX Runtime 1.32 dies in it (SIGSEGV) on a product of
    fp16 with a weight behind Transpose and Split.
    """
    with graph.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(CONVOLUTION) >= 0


def _int8_saturates() -> bool:
    """Whether the processor adds int8 products in 16 bits, as x86 without VNNI does; exact sums are slower there.

    Measured: with VNNI the exact kernels halve the prefill rate of int8 bundles for nothing. Where it cannot be told
    (no /proc/cpuinfo), the sums are exact.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        return "vnni" not in CPUINFO.read_text("ascii", "replace")
    except OSError:
        return True


def _spec(item: Any) -> TensorSpec:  # noqa: ANN401 - ONNX Runtime's NodeArg has no type of its own
    shape = tuple(dim if isinstance(dim, int) else str(dim) for dim in item.shape)
    return TensorSpec(item.name, DTYPES.get(item.type, item.type), shape)
