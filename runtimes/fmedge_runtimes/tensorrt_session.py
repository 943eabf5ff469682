"""The TensorRT backend: an engine that `fmedge build` made, on an NVIDIA GPU.

One engine with its optimization profiles, one execution context that changes between them, one stream. Buffers are
device memory, bound by address, so that a cache is input and output at once. What a step brings and takes (ids, logits)
lies in pinned host memory; an integrated GPU reads it where it is. A step that comes again and again is captured as a
CUDA graph (tensorrt_graphs.py).

Evidence: driven by the real decoder and cache in tests, over doubles of TensorRT and CUDA that refuse what the real
modules do not have. It has not run on a GPU (docs/evidence.md).
"""

from __future__ import annotations

import math
import mmap
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fmedge_runtimes.cuda import Cuda, DeviceMemory, open_cuda
from fmedge_runtimes.cuda_memory import CudaBuffer, CudaMemory, own
from fmedge_runtimes.device import parse_device
from fmedge_runtimes.engine_file import Engine, Machine, check_engine, read_engine
from fmedge_runtimes.errors import BackendError, RequestError
from fmedge_runtimes.session import Array, Buffer, TensorSpec
from fmedge_runtimes.tensorrt_graphs import Graphs
from fmedge_runtimes.tensorrt_library import LIBRARIES, collecting_logger, import_bindings, register_plugins
from fmedge_runtimes.tensorrt_step import Staging, Step, find_profile, largest_of, read_profiles

DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT64": "int64",
    "INT32": "int32",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
}
"""What numpy calls TensorRT's types."""
STEPS = 32
"""Kinds of steps that a binding remembers; a prompt's last piece has any length."""

StepKey = tuple[tuple[str, tuple[int, ...]], ...]


class TensorRTSession:
    """An engine; see `session.Session` for the contract.

    Raises BackendError when there is no engine for this graph and machine, no GPU, or no TensorRT.
    """

    captures = False
    """Steps are captured by their shapes; no scalar of theirs is read on the host."""

    def __init__(self, graph: Path, device: str, threads: int | None, cuda_graphs: bool = True) -> None:
        if parse_device(device).index:
            kind = parse_device(device).kind
            raise BackendError(f"there is no device {device}: TensorRT runs on the first GPU; write {kind}.")
        if threads is not None:
            raise RequestError(f"--threads is for the CPU; the device {device} takes none.")
        library = LIBRARIES[device]
        engine = read_engine(graph, library.name)
        # Before TensorRT is touched: without a GPU a Runtime ends the process.
        self._cuda = open_cuda(parse_device(device))
        self._cuda.activate()
        self._memory = CudaMemory(self._cuda)
        self._trt = import_bindings(library)
        check_engine(engine, graph, machine_of(self._cuda, self._trt, library.name))
        self._rebuild = engine.rebuild
        self._logger = collecting_logger(self._trt)
        register_plugins(self._trt, self._logger)
        self._engine: Any = self._deserialize(engine)
        self._closed = False
        inputs, self.outputs = self._specs()
        self._profiles = read_profiles(self._engine, inputs)
        self.inputs = tuple(replace(spec, largest=largest_of(self._profiles, spec.name)) for spec in inputs)
        self._working: DeviceMemory | None = self._cuda.allocate(working_memory(self._engine))
        self._context: Any = self._new_context()
        self._staging = Staging(self._cuda)
        self._graphs = Graphs(self._cuda, self._new_context, self._queue)
        if not cuda_graphs:
            self._graphs.problem = "CUDA graphs were turned off"
        self._prepared: Step | None = None
        """The step that the context knows of."""
        self._unbound = TensorRTBinding(self, {}, {})
        # Rolling caches are not written for TensorRT: windows are masks there.
        self.window_slack = False

    def _deserialize(self, engine: Engine) -> Any:  # noqa: ANN401 - an ICudaEngine
        runtime = self._trt.Runtime(self._logger)
        # Mapped, so that the file's bytes are not in memory twice while the engine is made of them.
        with engine.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            found = runtime.deserialize_cuda_engine(content)
        if found is None:
            words = "; ".join(self._logger.errors) or "it gives no reason"
            raise BackendError(f"TensorRT refuses {engine.path}: {words}; build it again: {engine.rebuild}")
        self._runtime = runtime  # which must outlive the engine
        return found

    def _new_context(self) -> Any:  # noqa: ANN401 - an IExecutionContext
        """An execution context over the working memory that all contexts share: one step runs at a time."""
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(strategy)
        if context is None:
            raise BackendError(f"TensorRT made no execution context: {self._said()}; free memory on the device.")
        if self._working is not None:
            context.set_device_memory(self._working.address, self._working.nbytes)
        return context

    def _said(self) -> str:
        words = "; ".join(self._logger.errors) or "it gives no reason"
        self._logger.errors.clear()
        return words

    def _specs(self) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        inputs: list[TensorSpec] = []
        outputs: list[TensorSpec] = []
        for number in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(number)
            kind = self._engine.get_tensor_dtype(name).name
            if kind not in DTYPES:
                raise BackendError(f"{name} is of TensorRT's type {kind}, which numpy has not; export it in fp16.")
            if self._engine.get_tensor_location(name) != self._trt.TensorLocation.DEVICE:
                raise BackendError(f"{name} is a shape that TensorRT wants on the host; export the bundle again.")
            axes = enumerate(self._engine.get_tensor_shape(name))
            spec = TensorSpec(name, DTYPES[kind], tuple(f"{name}.{axis}" if size < 0 else size for axis, size in axes))
            (inputs if self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT else outputs).append(spec)
        return tuple(inputs), tuple(outputs)

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> CudaBuffer:
        """A zeroed buffer. Raises MemoryError."""
        return self._memory.allocate(shape, dtype)

    def free_memory(self) -> int | None:
        """What is free on the device."""
        return self._memory.free()

    def copy(self, source: Buffer, target: Buffer, shape: tuple[int, ...] | None = None) -> None:
        """Copy the leading block of that shape, or the one that both buffers have in common."""
        self._memory.copy(source, target, shape or tuple(map(min, source.shape, target.shape)))

    def read(self, buffer: Buffer, start: int = 0, stop: int | None = None) -> Array:
        """The elements start:stop of a flattened buffer, on the host."""
        return self._memory.read(buffer, start, math.prod(buffer.shape) if stop is None else stop)

    def bind(self, feeds: Mapping[str, Buffer], results: Mapping[str, Buffer]) -> TensorRTBinding:
        """Bind inputs and outputs to buffers that stay where they are."""
        return TensorRTBinding(self, _device_buffers(feeds), _device_buffers(results))

    def run(self, feeds: Mapping[str, Array | Buffer], results: Mapping[str, Array | Buffer]) -> dict[str, Array]:
        """Run the engine once; see `Session.run`."""
        buffers = [
            {name: value for name, value in named.items() if not isinstance(value, np.ndarray)}
            for named in (feeds, results)
        ]
        # Without buffers a step is known again, and can be captured.
        binding = self.bind(*buffers) if any(buffers) else self._unbound
        given = {name: value for name, value in feeds.items() if isinstance(value, np.ndarray)}
        filled = {name: value for name, value in results.items() if isinstance(value, np.ndarray)}
        return binding.run(given, filled, [spec.name for spec in self.outputs if spec.name not in results])

    def step(
        self,
        binding: TensorRTBinding,
        feeds: Mapping[str, Array],
        results: Mapping[str, Array],
        returned: Sequence[str],
    ) -> dict[str, Array]:
        """Run the engine once, with buffers that are bound and arrays that are copied."""
        with self._cuda.turn():
            if self._closed:
                raise BackendError("the session is closed; load the model again.")
            self._logger.errors.clear()
            key = tuple((name, array.shape) for name, array in feeds.items())
            step = binding.steps.get(key)
            if step is None or step.generation != self._staging.generation:
                step = binding.remember(key, self._prepare(binding, feeds))
            for name, array in feeds.items():
                self._staging.fill(name, array)
            if not self._graphs.run(step):
                if self._prepared is not step:
                    step.prepare(self._context, self._cuda.stream)
                    step.address(self._context)
                    self._prepared = step
                self._queue(self._context, step)
            self._cuda.synchronize()
            made = {name: self._staging.read(name, shape, dtype) for name, (shape, dtype) in step.fetched.items()}
            for name, array in results.items():
                if array.shape != made[name].shape or array.dtype != made[name].dtype:
                    raise BackendError(
                        f"the engine gives {name} as {made[name].dtype} {list(made[name].shape)}, where "
                        f"{array.dtype} {list(array.shape)} is expected; build it again: {self._rebuild}"
                    )
                array[...] = made[name]
            return {name: made[name].copy() for name in returned}

    def _prepare(self, binding: TensorRTBinding, feeds: Mapping[str, Array]) -> Step:
        """A step with these buffers and shapes. Raises BackendError when the engine was not built for it."""
        shapes = {name: array.shape for name, array in feeds.items()}
        shapes |= {name: buffer.shape for name, buffer in binding.feeds.items()}
        missing = [spec.name for spec in self.inputs if spec.name not in shapes]
        if missing or len(shapes) > len(self.inputs):
            raise BackendError(f"the engine takes {', '.join(spec.name for spec in self.inputs)}; build it again.")
        addresses = {name: buffer.address for name, buffer in (*binding.feeds.items(), *binding.results.items())}
        brought = {name: array.nbytes for name, array in feeds.items()}
        addresses |= {name: self._staging.reserve(name, nbytes) for name, nbytes in brought.items()}
        fetched: dict[str, tuple[tuple[int, ...], np.dtype[np.generic]]] = {}
        profile = find_profile(self._profiles, shapes, self._rebuild)
        step = Step(profile, shapes, addresses, brought, fetched, 0)
        self._prepared = None
        step.prepare(self._context, self._cuda.stream)
        for spec in self.outputs:
            shape = tuple(self._context.get_tensor_shape(spec.name))
            if min(shape, default=0) < 0:
                raise BackendError(f"TensorRT cannot say the shape of {spec.name} before it runs: {self._said()}.")
            bound = binding.results.get(spec.name)
            if bound is None:
                fetched[spec.name] = shape, np.dtype(spec.dtype)
                nbytes = math.prod(shape) * np.dtype(spec.dtype).itemsize
                addresses[spec.name] = self._staging.reserve(spec.name, nbytes)
            elif bound.shape != shape:
                raise BackendError(f"the engine gives {spec.name} as {shape}, and {bound.shape} is bound to it.")
        step.generation = self._staging.generation
        return step

    def _queue(self, context: Any, step: Step) -> None:  # noqa: ANN401 - an IExecutionContext
        """Put a step on the stream: copies there, the engine, copies back."""
        for name, nbytes in step.brought.items():
            self._staging.upload(name, nbytes)
        if not context.execute_async_v3(self._cuda.stream):
            raise BackendError(f"TensorRT failed: {self._said()}")
        for name, (shape, dtype) in step.fetched.items():
            self._staging.download(name, math.prod(shape) * dtype.itemsize)

    @property
    def graph_problem(self) -> str | None:
        """Why steps are not captured as CUDA graphs; None as long as they can be."""
        return self._graphs.problem

    def close(self) -> None:
        """Give the memory back."""
        with self._cuda.turn():
            self._closed = True
            self._graphs.clear()
            self._staging.clear()
            self._prepared = self._context = self._engine = self._runtime = self._working = None
            self._unbound.steps.clear()


class TensorRTBinding:
    """A session with its buffers bound; see `session.Binding`. It keeps the buffers alive."""

    def __init__(
        self, session: TensorRTSession, feeds: Mapping[str, CudaBuffer], results: Mapping[str, CudaBuffer]
    ) -> None:
        self._session = session
        self.feeds = feeds
        self.results = results
        self.steps: OrderedDict[StepKey, Step] = OrderedDict()
        """By the shapes of what is not bound."""

    def remember(self, key: StepKey, step: Step) -> Step:
        """Keep a step for when it comes again."""
        self.steps[key] = step
        if len(self.steps) > STEPS:
            self.steps.popitem(last=False)
        return step

    def run(
        self,
        feeds: Mapping[str, Array],
        results: Mapping[str, Array | Buffer],
        returned: Sequence[str] = (),
        *,
        steady: bool = False,
    ) -> dict[str, Array]:
        """Run the engine once; see `session.Binding.run`. The outputs in `returned` come back as new arrays.

        Nothing follows from `steady`: what comes a third time is captured, and a step is never run twice for it.
        """
        del steady
        arrays = {name: value for name, value in results.items() if isinstance(value, np.ndarray)}
        if len(arrays) != len(results):
            raise TypeError("outputs are bound to buffers with `bind`, and to arrays in `run`")
        return self._session.step(self, feeds, arrays, returned)


def _device_buffers(named: Mapping[str, Buffer]) -> dict[str, CudaBuffer]:
    return {name: own(buffer) for name, buffer in named.items()}


def working_memory(engine: Any) -> int:  # noqa: ANN401 - an ICudaEngine
    """Bytes that a step takes on the device, with the profile that takes most."""
    profiles = range(engine.num_optimization_profiles)
    return max(int(engine.get_device_memory_size_for_profile_v2(number)) for number in profiles)


def machine_of(cuda: Cuda, trt: Any, library: str) -> Machine:  # noqa: ANN401 - the bindings have no types
    """What engines are compared with."""
    return Machine(library, str(trt.__version__), ".".join(map(str, cuda.device.capability)), cuda.device.name)
