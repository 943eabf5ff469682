"""TensorRT on a machine without it: a builder whose engines are computed by ONNX Runtime's CPU provider.

An engine is JSON: the path of the graph, its types, and the profiles. A context reads inputs and writes outputs at the
addresses that it was told, in the "device memory" of fake_cuda, so that whole generations run through our session. What
TensorRT's documentation calls undefined raises AssertionError: a Runtime before CUDA, shapes outside the profile, an
address that was never set, a captured graph whose context was changed.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from fake_cuda import FakeCuda
from fmedge_runtimes.onnxruntime_session import OnnxRuntimeSession
from strict_double import StrictModule, read_inventory

TYPES = {1: "FLOAT", 10: "HALF", 7: "INT64", 6: "INT32", 3: "INT8", 2: "UINT8", 9: "BOOL"}
"""TensorRT's types by ONNX's numbers."""
NUMPY = {"FLOAT": "float32", "HALF": "float16", "INT64": "int64", "INT32": "int32", "INT8": "int8", "BOOL": "bool"}
WORKING = 4096
"""What a context says that it needs, for each profile."""


@dataclass
class FakeTensorRT:
    """The library behind the module; `fail` are the messages of builds that fail."""

    cuda: FakeCuda
    inventory: str = "tensorrt-10.3.0"
    fail: tuple[str, ...] = ()
    refuse: tuple[tuple[str, str, str], ...] = ()
    """Operator, node and words of what the parser refuses."""
    steps: int = 4
    """Of a build."""
    on_step: Any = None
    """Called in every step of a build."""
    sessions: dict[str, Any] = field(default_factory=dict)
    contexts: list[Any] = field(default_factory=list)
    executed: list[tuple[int, dict[str, tuple[int, ...]]]] = field(default_factory=list)
    """Profile and shapes of every run."""
    limits: dict[str, int] = field(default_factory=dict)
    timing: list[bytes] = field(default_factory=list)

    def module(self) -> StrictModule:
        """The module `tensorrt`, or `tensorrt_rtx_bindings`."""
        library = self
        made: dict[str, Any] = {}

        class ILogger:
            def log(self, severity: Any, msg: str) -> None:
                raise NotImplementedError

        class IProgressMonitor:
            def phase_start(self, *_: Any) -> None: ...
            def phase_finish(self, *_: Any) -> None: ...
            def step_complete(self, *_: Any) -> bool: ...

        class Base:
            def __init__(self, state: Any = None) -> None:
                self._state = state

        class ITensor(Base):
            @property
            def name(self):
                return self._state.name

            @property
            def shape(self):
                return tuple(_sizes(self._state, -1))

            def get_dimension_name(self, index):
                return self._state.type.tensor_type.shape.dim[index].dim_param

        class INetworkDefinition(Base):
            @property
            def num_inputs(self):
                return len(self._state["model"].graph.input)

            def get_input(self, index):
                return made["ITensor"](self._state["model"].graph.input[index])

        class IOptimizationProfile(Base):
            def set_shape(self, input, min, opt, max):
                assert all(low <= usual <= high for low, usual, high in zip(min, opt, max, strict=True))
                self._state[input] = [list(min), list(opt), list(max)]

        class ITimingCache(Base):
            def serialize(self):
                return made["IHostMemory"](b"timed" + self._state)

        class IBuilderConfig(Base):
            builder_optimization_level = 3
            hardware_compatibility_level = 0
            num_compute_capabilities = 0
            progress_monitor = None

            def add_optimization_profile(self, profile):
                self._state["profiles"].append(profile._state)
                return len(self._state["profiles"]) - 1

            def set_memory_pool_limit(self, pool, pool_size):
                library.limits[pool.name] = pool_size

            def set_flag(self, flag):
                self._state["flags"].add(flag.name)

            def clear_flag(self, flag):
                self._state["flags"].discard(flag.name)

            def set_compute_capability(self, *_):
                pass

            def create_timing_cache(self, serialized_timing_cache):
                return made["ITimingCache"](bytes(serialized_timing_cache))

            def set_timing_cache(self, cache, ignore_mismatch):
                if cache._state and not cache._state.startswith(b"timed"):
                    return False
                library.timing.append(cache._state)
                self._state["timing"] = cache
                return True

            def get_timing_cache(self):
                return self._state["timing"]

        class IHostMemory(bytes):
            @property
            def nbytes(self):
                return len(self)

        class Builder(Base):
            def create_network(self, flags=0):
                strong = int(made["flag"].STRONGLY_TYPED)
                assert flags == 1 << strong
                return made["INetworkDefinition"]({})

            def create_builder_config(self):
                return made["IBuilderConfig"]({"profiles": [], "flags": {"TF32"}, "timing": None})

            def create_optimization_profile(self):
                return made["IOptimizationProfile"]({})

            def build_serialized_network(self, network, config):
                library.cuda.current()
                monitor, phase = config.progress_monitor, "Building Engine"
                monitor.phase_start(phase, None, library.steps)
                for step in range(library.steps):
                    if library.on_step is not None:
                        library.on_step(step)
                    if not monitor.step_complete(phase, step):
                        monitor.phase_finish(phase)
                        return None
                monitor.phase_finish(phase)
                if library.fail:
                    for message in library.fail:
                        self._state.log(made["ILogger"].Severity.ERROR, message)
                    return None
                record = {"graph": str(network._state["path"]), "profiles": config._state["profiles"]}
                record["flags"] = sorted(config._state["flags"])
                return made["IHostMemory"](json.dumps(record).encode())

        class ParserError(Base):
            def desc(self):
                return self._state[2]

            def node_name(self):
                return self._state[1]

            def node_operator(self):
                return self._state[0]

        class OnnxParser(Base):
            def __init__(self, network, logger):
                super().__init__(network)

            def parse_from_file(self, model):
                path = Path(model)
                self._state._state |= {"path": path, "model": onnx.load(path, load_external_data=False)}
                return not library.refuse

            @property
            def num_errors(self):
                return len(library.refuse)

            def get_error(self, index):
                return made["ParserError"](library.refuse[index])

        class Runtime(Base):
            def __init__(self, logger):
                assert library.cuda.started, "a Runtime without a CUDA device ends the process"
                super().__init__(logger)

            def deserialize_cuda_engine(self, serialized_engine):
                library.cuda.current()
                try:
                    record = json.loads(bytes(serialized_engine))
                except ValueError:
                    self._state.log(made["ILogger"].Severity.ERROR, "Serialization assertion failed.")
                    return None
                return made["ICudaEngine"](_Engine(library, record))

        class ICudaEngine(Base):
            @property
            def num_io_tensors(self):
                return len(self._state.tensors)

            @property
            def num_optimization_profiles(self):
                return len(self._state.profiles)

            def get_tensor_name(self, index):
                return list(self._state.tensors)[index]

            def get_tensor_dtype(self, name):
                return made["type"][TYPES[self._state.tensors[name].type.tensor_type.elem_type]]

            def get_tensor_mode(self, name):
                return made["mode"].INPUT if name in self._state.inputs else made["mode"].OUTPUT

            def get_tensor_location(self, name):
                return made["location"].DEVICE

            def get_tensor_shape(self, name):
                return tuple(_sizes(self._state.tensors[name], -1))

            def get_tensor_profile_shape(self, name, profile_index):
                fixed = list(_sizes(self._state.tensors[name], -1))
                return [tuple(sizes) for sizes in self._state.profiles[profile_index].get(name, [fixed] * 3)]

            def get_device_memory_size_for_profile_v2(self, profile_index):
                return WORKING * (profile_index + 1)

            def create_execution_context(self, strategy=None):
                assert strategy == made["strategy"].USER_MANAGED
                context = made["IExecutionContext"](_Context(self._state))
                library.contexts.append(context)
                return context

        class IExecutionContext(Base):
            @property
            def active_optimization_profile(self):
                return self._state.profile

            def set_optimization_profile_async(self, profile_index, stream_handle):
                self._state.touch()
                self._state.profile = profile_index
                self._state.shapes = {}
                return 0 <= profile_index < len(self._state.engine.profiles)

            def set_device_memory(self, memory, size):
                library.cuda.check(memory, size)
                self._state.memory = size

            def set_input_shape(self, name, shape):
                self._state.touch()
                return self._state.set_shape(name, tuple(shape))

            def get_tensor_shape(self, name):
                return self._state.shape_of(name)

            def set_tensor_address(self, name, memory):
                self._state.touch()
                assert memory % 16 == 0, "TensorRT wants aligned addresses"
                self._state.addresses[name] = memory
                return True

            def execute_async_v3(self, stream_handle):
                assert int(stream_handle) == 4242
                return self._state.execute()

        def init_libnvinfer_plugins(logger, namespace):
            assert namespace == ""
            return True

        plays = {name: value for name, value in locals().items() if isinstance(value, type) and name != "Base"}
        inventory = read_inventory(self.inventory)
        known = inventory["classes"]
        functions = {"init_libnvinfer_plugins": init_libnvinfer_plugins} if inventory["functions"] else {}
        module = StrictModule(inventory, {name: plays[name] for name in plays if name in known} | functions)
        made |= {name: getattr(module, name) for name in plays if name in known}
        made |= {
            "flag": module.NetworkDefinitionCreationFlag,
            "type": module.DataType,
            "mode": module.TensorIOMode,
            "location": module.TensorLocation,
            "strategy": module.ExecutionContextAllocationStrategy,
        }
        return module


def _sizes(value: Any, dynamic: Any) -> list[Any]:
    return [
        dim.dim_value if dim.HasField("dim_value") else dynamic or dim.dim_param
        for dim in value.type.tensor_type.shape.dim
    ]


class _Engine:
    """A graph and its profiles."""

    def __init__(self, library: FakeTensorRT, record: dict[str, Any]) -> None:
        self.library = library
        self.path = record["graph"]
        self.profiles = record["profiles"]
        graph = onnx.load(self.path, load_external_data=False).graph
        self.inputs = {value.name: value for value in graph.input}
        self.outputs = {value.name: value for value in graph.output}
        self.tensors = {**self.inputs, **self.outputs}

    @property
    def session(self) -> Any:
        """The graph in ONNX Runtime, opened once."""
        if self.path not in self.library.sessions:
            # With the options that our own CPU session has, so that numbers are the same.
            self.library.sessions[self.path] = OnnxRuntimeSession(Path(self.path), "cpu", None).graph
        return self.library.sessions[self.path]


class _Context:
    """Profile, shapes and addresses, and what runs with them."""

    def __init__(self, engine: _Engine) -> None:
        self.engine = engine
        self.profile = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.memory = 0
        self.captured = False

    def touch(self) -> None:
        """Note a change."""
        assert not self.captured, "a captured context was changed: its graph is undefined from now on"

    def set_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a shape is in the profile."""
        fixed = _sizes(self.engine.inputs[name], -1)
        low, _, high = self.engine.profiles[self.profile].get(name, [fixed] * 3)
        fits = len(shape) == len(low) and all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))
        if fits:
            self.shapes[name] = shape
        return fits

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, of outputs by the names of the axes or by running the graph."""
        if name in self.engine.inputs:
            return self.shapes.get(name, tuple(_sizes(self.engine.inputs[name], -1)))
        axes = {}
        for given, value in self.engine.inputs.items():
            named = _sizes(value, None)
            axes |= {axis: size for axis, size in zip(named, self.shapes[given], strict=True) if isinstance(axis, str)}
        wanted = _sizes(self.engine.outputs[name], None)
        if all(isinstance(axis, int) or axis in axes for axis in wanted):
            return tuple(axes.get(axis, axis) for axis in wanted)
        feeds = {
            given: np.zeros(self.shapes[given], onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))
            for given, value in self.engine.inputs.items()
        }
        return tuple(self.engine.session.run([name], feeds)[0].shape)

    def execute(self) -> bool:
        """Put a run on the stream, with everything as it is now."""
        cuda = self.engine.library.cuda
        assert set(self.shapes) == set(self.engine.inputs), "an input has no shape"
        assert set(self.addresses) == set(self.engine.tensors), "a tensor has no address"
        assert self.memory >= WORKING * (self.profile + 1), "the context has too little memory"
        sizes: dict[str, int] = {}
        for name, value in self.engine.inputs.items():
            for axis, size in zip(_sizes(value, None), self.shapes[name], strict=True):
                if isinstance(axis, str):
                    assert sizes.setdefault(axis, size) == size, f"{axis} of {name} is {size} and {sizes[axis]}"
        shapes = {name: self.shape_of(name) for name in self.engine.tensors}
        addresses, profile = dict(self.addresses), self.profile
        if cuda.capturing is not None:
            self.captured = True
        cuda.do(lambda: self._run(profile, shapes, addresses))
        return True

    def _run(self, profile: int, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        library, session = self.engine.library, self.engine.session
        binding = session.io_binding()
        for name, value in self.engine.tensors.items():
            dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            library.cuda.check(addresses[name], math.prod(shapes[name]) * dtype.itemsize)
            bind = binding.bind_input if name in self.engine.inputs else binding.bind_output
            bind(name, "cpu", 0, dtype.type, shapes[name], addresses[name])
        library.executed.append((profile, {name: shapes[name] for name in self.engine.inputs}))
        session.run_with_iobinding(binding)
