"""The ONNX Runtime backend: CPU and CUDA.

On the CPU a buffer is a numpy array that the session reads and writes in place. On CUDA it is an OrtValue's memory,
bound by its address. Evidence: the CPU path runs in every test; the CUDA path follows ONNX Runtime's documentation and
has not run on a GPU yet (docs/evidence.md).
"""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fmedge_runtimes.errors import BackendError
from fmedge_runtimes.memory import available_bytes
from fmedge_runtimes.session import Array, Buffer, TensorSpec

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


@dataclass(frozen=True, slots=True)
class CudaBuffer:
    """A buffer in device memory; `owner` keeps it alive."""

    owner: Any
    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]

    def rows(self, start: int, stop: int) -> CudaBuffer:
        """The rows start:stop, sharing memory."""
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        shape = (stop - start, *self.shape[1:])
        return CudaBuffer(self.owner, self.address + start * row_bytes, shape, self.dtype)


class OnnxRuntimeSession:
    """A graph opened in ONNX Runtime; see `session.Session` for the contract.

    Raises BackendError when ONNX Runtime is not installed, lacks the provider or refuses the graph.
    """

    def __init__(self, graph: Path, device: str, threads: int | None) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            extra = "gpu" if device == "cuda" else "cpu"
            raise BackendError(f"ONNX Runtime is not installed: pip install 'fmedge[{extra}]'.") from error
        provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device]
        if provider not in onnxruntime.get_available_providers():
            raise BackendError(
                f"the installed onnxruntime has no {provider}: pip uninstall onnxruntime, pip install 'fmedge[gpu]'."
            )
        options = onnxruntime.SessionOptions()
        # What ONNX Runtime would log of an error, its exception says.
        options.log_severity_level = 4
        # Where ONNX Runtime joins DequantizeLinear and MatMul, activations are not rounded to int8.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        if _int8_saturates():
            options.add_session_config_entry("session.x64quantprecision", "1")
        if threads is not None:
            options.intra_op_num_threads = threads
        self._ort = onnxruntime
        self._device = device
        try:
            self._session: Any = onnxruntime.InferenceSession(str(graph), options, providers=[provider])
        except Exception as error:
            raise BackendError(f"ONNX Runtime {onnxruntime.__version__} cannot open {graph}: {error}") from error
        if provider not in self._session.get_providers():
            raise BackendError(f"{provider} could not start; check the NVIDIA driver and the CUDA libraries.")
        self.inputs = tuple(_spec(item) for item in self._session.get_inputs())
        self.outputs = tuple(_spec(item) for item in self._session.get_outputs())
        # The CUDA kernel wants windows of exactly their length (GroupQueryAttention, sliding_window_cache).
        self.window_slack = device == "cpu"

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> Buffer:
        """A zeroed buffer. Raises MemoryError."""
        host = np.zeros(shape, dtype)
        if self._device == "cpu":
            return HostBuffer(host)
        value = self._ort.OrtValue.ortvalue_from_numpy(host, "cuda", 0)
        return CudaBuffer(value, value.data_ptr(), shape, dtype)

    def free_memory(self) -> int | None:
        """What the machine has free; unknown for a GPU, where ONNX Runtime does not tell."""
        return available_bytes() if self._device == "cpu" else None

    def copy(self, source: Buffer, target: Buffer, shape: tuple[int, ...] | None = None) -> None:
        """Copy the leading block of that shape, or the one that both buffers have in common."""
        block = tuple(map(slice, map(min, source.shape, target.shape) if shape is None else shape))
        if isinstance(source, HostBuffer) and isinstance(target, HostBuffer):
            target.array[block] = source.array[block]
            return
        if not isinstance(source, CudaBuffer) or not isinstance(target, CudaBuffer):
            raise TypeError("both buffers must be this session's")
        # ONNX Runtime has no copy inside the device; caches grow rarely, so the way over the host is bearable.
        host = self._download(target)
        host[block] = self._download(source)[block]
        self._upload(host, target)

    def _download(self, buffer: CudaBuffer) -> Array:
        whole: Array = buffer.owner.numpy().reshape(-1)
        start = (buffer.address - buffer.owner.data_ptr()) // buffer.dtype.itemsize
        return whole[start : start + math.prod(buffer.shape)].reshape(buffer.shape).copy()

    def _upload(self, host: Array, buffer: CudaBuffer) -> None:
        whole: Array = buffer.owner.numpy()
        start = (buffer.address - buffer.owner.data_ptr()) // buffer.dtype.itemsize
        whole.reshape(-1)[start : start + host.size] = host.reshape(-1)
        buffer.owner.update_inplace(whole)

    def bind(self, feeds: Mapping[str, Buffer], results: Mapping[str, Buffer]) -> OnnxRuntimeBinding:
        """Bind inputs and outputs to buffers that stay where they are."""
        if self._session is None:
            raise BackendError("the session is closed; load the model again.")
        return OnnxRuntimeBinding(self._session, self._device, feeds, results)

    def run(self, feeds: Mapping[str, Array | Buffer], results: Mapping[str, Array | Buffer]) -> dict[str, Array]:
        """Run the graph once; see `Session.run`."""
        returned = [item.name for item in self.outputs if item.name not in results]
        binding = self.bind(_buffers(feeds), _buffers(results))
        outputs = binding.run(_arrays(feeds), _arrays(results), returned)
        return dict(zip(returned, outputs, strict=True))

    def close(self) -> None:
        """Give the session's memory back."""
        self._session = None


class OnnxRuntimeBinding:
    """A session with its buffers bound; see `session.Binding`. It keeps the buffers alive."""

    def __init__(
        self,
        session: Any,  # noqa: ANN401 - ONNX Runtime is imported only where it is used
        device: str,
        feeds: Mapping[str, Buffer],
        results: Mapping[str, Buffer],
    ) -> None:
        self._session = session
        self._binding: Any = session.io_binding()
        self._buffers = (feeds, results)
        for bind, named in ((self._binding.bind_input, feeds), (self._binding.bind_output, results)):
            for name, buffer in named.items():
                if not isinstance(buffer, HostBuffer | CudaBuffer):
                    raise TypeError(f"{name} is bound to a buffer of another backend")
                bind(name, device, 0, buffer.dtype.type, buffer.shape, buffer.address)

    def run(
        self, feeds: Mapping[str, Array], results: Mapping[str, Array], returned: Sequence[str] = ()
    ) -> list[Array]:
        """Run the graph once; see `session.Binding.run`. ONNX Runtime makes the memory of the outputs in `returned`."""
        for name, array in feeds.items():
            self._binding.bind_cpu_input(name, array)
        for name, array in results.items():
            self._binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for name in returned:
            self._binding.bind_output(name, "cpu")
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed: {error}") from error
        if not returned:
            return []
        # Outputs come in the order in which they were bound first.
        return [output.numpy() for output in self._binding.get_outputs()[-len(returned) :]]


def _buffers(named: Mapping[str, Array | Buffer]) -> dict[str, Buffer]:
    return {name: value for name, value in named.items() if not isinstance(value, np.ndarray)}


def _arrays(named: Mapping[str, Array | Buffer]) -> dict[str, Array]:
    return {name: value for name, value in named.items() if isinstance(value, np.ndarray)}


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
