"""ONNX Runtime on a GPU that host memory plays (fake_cuda.py), as far as fmedge uses it.

Everything that is computed is computed by the real ONNX Runtime on the CPU, over memory that the driver's double
allocated. Both are stricter than the real ones: addresses must lie in memory that is allocated, names of options must
be known, and a recorded step must be replayed with exactly what it was recorded with. What ONNX Runtime's module lacks,
this one lacks, too. It proves nothing of kernels, streams or speed.
"""

from __future__ import annotations

import sys
import types

import numpy as np
import onnxruntime
from fake_cuda import FakeCuda
from fmedge_runtimes.cuda import open_cuda

PROVIDER_OPTIONS = {
    "device_id": {"0", "1"},
    "arena_extend_strategy": {"kSameAsRequested", "kNextPowerOfTwo"},
    "enable_cuda_graph": {"1"},
}
"""Of CUDAExecutionProvider: those that are used, and the values that they take."""


class HostBinding:
    """An IOBinding whose buffers on the GPU lie in the driver's memory."""

    def __init__(self, real, driver, index):
        self.real, self.driver, self.index = real, driver, index
        self.inputs, self.outputs = {}, {}

    def bind_input(self, name, device_type, device_id, element_type, shape, buffer_ptr):
        self._check(device_type, device_id, element_type, shape, buffer_ptr)
        self.inputs[name] = (device_type, tuple(shape), buffer_ptr)
        self.real.bind_input(name, "cpu", 0, element_type, shape, buffer_ptr)

    def bind_cpu_input(self, name, arr_on_cpu):
        assert arr_on_cpu.flags.c_contiguous
        self.inputs[name] = ("cpu", arr_on_cpu.shape, arr_on_cpu)
        self.real.bind_cpu_input(name, arr_on_cpu)

    def bind_output(self, name, device_type="cpu", device_id=0, element_type=None, shape=None, buffer_ptr=None):
        if buffer_ptr is not None:
            self._check(device_type, device_id, element_type, shape, buffer_ptr)
        self.outputs[name] = (device_type, None if shape is None else tuple(shape), buffer_ptr)
        self.real.bind_output(name, "cpu", 0, element_type, shape, buffer_ptr)

    def get_outputs(self):
        return self.real.get_outputs()

    def _check(self, kind, index, element_type, shape, address):
        if kind == "cuda":
            assert index == self.index, "memory of another GPU"
            nbytes = int(np.prod(shape)) * np.dtype(element_type).itemsize
            assert self.driver.holds(address, nbytes), "memory that is not the GPU's"


class HostSession:
    """An InferenceSession on the CPU that says it is on a GPU, and records steps."""

    def __init__(self, gpu, path, options, providers, disabled):
        ((name, settings),) = providers
        assert name == "CUDAExecutionProvider"
        for option, value in settings.items():
            assert value in PROVIDER_OPTIONS[option], f"{option}={value}"
        self.gpu, self.settings = gpu, settings
        self.records = settings.get("enable_cuda_graph") == "1"
        if self.records and gpu.refuses_graphs:
            raise RuntimeError("This session cannot use the graph capture feature")
        self.real = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
        )
        self.recorded, self.eager, self.replays = {}, 0, 0
        gpu.sessions.append(self)

    def __getattr__(self, name):
        return getattr(self.real, name)

    def get_providers(self):
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def io_binding(self):
        return HostBinding(self.real.io_binding(), self.gpu.driver, int(self.settings["device_id"]))

    def run_with_iobinding(self, iobinding, run_options=None):
        if self.gpu.fails is not None:
            raise RuntimeError(self.gpu.fails)
        number = "-1"
        if self.records:
            # ONNX Runtime would take id 0, and record whatever comes first.
            assert run_options is not None, "a session that records needs an id for every run"
            number = run_options.get_run_config_entry("gpu_graph_id")
        if number == "-1":
            self.eager += 1
            self.real.run_with_iobinding(iobinding.real, None)
            return
        if self.gpu.spoils is not None:
            raise RuntimeError(self.gpu.spoils)
        seen = self._signature(iobinding)
        if number not in self.recorded:
            assert all(kind == "cuda" for kind, _, _ in iobinding.outputs.values()), "an output on the host"
            assert all(kind == "cuda" or not shape for kind, shape, _ in iobinding.inputs.values())
            self.recorded[number] = seen
            # Twice before it records: memory is allocated in the first runs.
            for _ in range(2):
                self.real.run_with_iobinding(iobinding.real, None)
        else:
            self.replays += 1
        assert self.recorded[number] == seen, "a replay with other addresses, shapes or scalars"
        self.real.run_with_iobinding(iobinding.real, None)

    @staticmethod
    def _signature(binding):
        def fixed(bound):
            kind, shape, at = bound
            return (kind, shape, at.tobytes() if isinstance(at, np.ndarray) else at)

        return {name: fixed(bound) for name, bound in {**binding.inputs, **binding.outputs}.items()}


class HostGpu:
    """`onnxruntime` with a GPU. `fails` makes every run fail in these words, `spoils` those that are recorded."""

    def __init__(self, driver):
        self.driver = driver
        self.sessions: list[HostSession] = []
        self.refuses_graphs = False
        self.fails = self.spoils = None

    def __getattr__(self, name):
        # Whatever the real module lacks is an AttributeError here, too.
        return getattr(onnxruntime, name)

    def get_available_providers(self):
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def preload_dlls(self):
        assert hasattr(onnxruntime, "preload_dlls")

    def InferenceSession(self, path, options, providers, disabled_optimizers=None):
        if providers == ["CPUExecutionProvider"]:
            return onnxruntime.InferenceSession(
                path, options, providers=providers, disabled_optimizers=disabled_optimizers
            )
        return HostSession(self, path, options, providers, disabled_optimizers)


def install(monkeypatch, total=1 << 30) -> HostGpu:
    """Put the doubles in the place of CUDA's bindings and of onnxruntime."""
    gpu = HostGpu(FakeCuda(devices=2, name="Host GPU", total=total))
    bindings = types.ModuleType("cuda.bindings")
    bindings.driver = gpu.driver.module()
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    open_cuda.cache_clear()
    monkeypatch.setitem(sys.modules, "onnxruntime", gpu)
    return gpu
