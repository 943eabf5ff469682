"""Build an engine of one graph with TensorRT's own builder, on the device that is to run it.

One path for TensorRT 10.3 to 11: the network is strongly typed, so that precision is what the graph says; names decide
what a version has, not its number. The engine is written aside and takes its place when it is whole and loads.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmedge_runtimes.bundle import sha256_of
from fmedge_runtimes.cuda import Cuda
from fmedge_runtimes.engine_file import (
    FOLDER,
    FORMAT,
    BuilderFacts,
    EngineFacts,
    Machine,
    engine_path,
    hashes_of,
    record_path,
    root_of,
    stored_aside,
    write_record,
)
from fmedge_runtimes.errors import BackendError
from fmedge_runtimes.manifest import ProfileFacts
from fmedge_runtimes.tensorrt_library import collecting_logger, register_plugins
from fmedge_runtimes.tensorrt_session import working_memory

from fmedge_converters.engines.failure import explain
from fmedge_converters.engines.monitor import Report, make_monitor

LEAST_WORKSPACE = 64 << 20
MOST_WORKSPACE = 4 << 30
"""Beyond that no layer has been seen to get faster."""
HARDWARE = {"same-compute-capability": "SAME_COMPUTE_CAPABILITY", "ampere-plus": "AMPERE_PLUS"}
WAIT = 0.2
"""Seconds between two looks at whether somebody has pressed Ctrl-C."""


@dataclass(frozen=True, slots=True)
class Built:
    """An engine that was built."""

    path: Path
    facts: EngineFacts
    seconds: float
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Builder:
    """What engines are built with."""

    trt: Any
    cuda: Cuda
    machine: Machine

    def build(self, graph: Path, profiles: Sequence[ProfileFacts], facts: BuilderFacts, report: Report) -> Built:
        """Build the engine of a graph, and put it beside its record.

        Raises BackendError when TensorRT refuses the graph or cannot build it; whatever it raises, an interrupt
        included, the engine that was there before is untouched.
        """
        started = time.perf_counter()
        self.cuda.activate()
        logger = collecting_logger(self.trt)
        register_plugins(self.trt, logger)
        builder = self.trt.Builder(logger)
        network, parser = self._parse(builder, graph, logger)
        config = self._config(builder, facts, weights_of(graph))
        for profile in profiles:
            config.add_optimization_profile(self._profile(builder, network, profile))
        path = engine_path(graph, self.machine.library)
        cache = root_of(graph) / FOLDER / f"timing.{self.machine.library}.cache"
        self._read_timings(config, cache)
        logger.errors.clear()  # of timings that were another GPU's
        plan = None
        try:
            plan = self._run(builder, network, config, report)
        finally:
            # What was timed before an interrupt is not timed again.
            self._write_timings(config, cache)
        del parser  # it held the weights
        if plan is None:
            raise BackendError(explain(f"building the engine of {graph}", logger.errors))
        with stored_aside(path) as aside:
            with aside.open("wb") as file:
                file.write(plan)
            del plan
            size, digest = aside.stat().st_size, sha256_of(aside)
            memory = self._working_memory(aside, logger)
            # An old record must not stand beside a new engine.
            record_path(path).unlink(missing_ok=True)
        found = hashes_of(graph)
        record = EngineFacts(
            format=FORMAT,
            graph=found[0],
            weights=found[1],
            library=self.machine.library,
            version=self.machine.version,
            capability=self.machine.capability,
            device=self.machine.device,
            system=self.machine.system,
            profiles=tuple(profiles),
            options=facts,
            bytes=size,
            sha256=digest,
            device_memory=memory,
        )
        write_record(path, record)
        return Built(path, record, time.perf_counter() - started, tuple(dict.fromkeys(logger.warnings)))

    def _parse(self, builder: Any, graph: Path, logger: Any) -> tuple[Any, Any]:  # noqa: ANN401 - TensorRT's objects
        trt = self.trt
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse_from_file(os.fspath(graph)):
            errors = [parser.get_error(number) for number in range(parser.num_errors)]
            words = [f"node {error.node_operator()} {error.node_name()}: {error.desc()}" for error in errors]
            raise BackendError(explain(f"parsing {graph}", words or logger.errors))
        return network, parser

    def _config(self, builder: Any, facts: BuilderFacts, weights: int) -> Any:  # noqa: ANN401 - TensorRT's objects
        trt, config = self.trt, builder.create_builder_config()
        # To time a layer takes its weights, inputs and outputs, beside its workspace.
        for pool, limit in (("WORKSPACE", facts.workspace), ("TACTIC_DRAM", 2 * facts.workspace + weights)):
            if hasattr(trt.MemoryPoolType, pool):
                config.set_memory_pool_limit(getattr(trt.MemoryPoolType, pool), limit)
        # The types of the graph are meant: fp32 is not to be computed in 19 bits.
        config.clear_flag(trt.BuilderFlag.TF32)
        if facts.optimization_level is not None:
            config.builder_optimization_level = facts.optimization_level
        if facts.version_compatible:
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        if facts.hardware != "this":
            level = getattr(trt.HardwareCompatibilityLevel, HARDWARE[facts.hardware], None)
            if level is None:
                raise BackendError(f"{self.machine.library} {self.machine.version} has no --hardware {facts.hardware}.")
            config.hardware_compatibility_level = level
        if hasattr(config, "num_compute_capabilities"):  # TensorRT-RTX: for the GPU of this machine
            config.num_compute_capabilities = 1
            config.set_compute_capability(trt.ComputeCapability.CURRENT, 0)
        return config

    @staticmethod
    def _profile(builder: Any, network: Any, facts: ProfileFacts) -> Any:  # noqa: ANN401 - TensorRT's objects
        profile = builder.create_optimization_profile()
        for number in range(network.num_inputs):
            tensor = network.get_input(number)
            sizes = tuple(tensor.shape)
            if -1 not in sizes:
                continue
            ranges = [
                (size, size, size) if size != -1 else _range(facts, tensor.name, tensor.get_dimension_name(axis))
                for axis, size in enumerate(sizes)
            ]
            profile.set_shape(tensor.name, *(tuple(each[kind] for each in ranges) for kind in range(3)))
        return profile

    def _run(self, builder: Any, network: Any, config: Any, report: Report) -> Any:  # noqa: ANN401 - TensorRT's objects
        """The serialized engine, or None. Raises KeyboardInterrupt when the builder has stopped.

        The builder does not return to Python's main thread before it is through, so an interrupt would not be noticed
        there: it runs in another thread, and the monitor hands the wish on.
        """
        stop, finished = threading.Event(), threading.Event()
        config.progress_monitor = make_monitor(self.trt, report, stop)
        found: list[Any] = []

        def build() -> None:
            try:
                if stop.is_set():
                    return
                self.cuda.activate()
                found.append(builder.build_serialized_network(network, config))
            except Exception as error:  # raised in the thread that waits
                found.append(error)
            finally:
                finished.set()

        thread = threading.Thread(target=build, name="fmedge-build", daemon=True)
        # An event, not the thread's end: Thread.join takes a thread for ended once it has been interrupted itself.
        try:
            thread.start()
            while not finished.wait(WAIT):
                pass
        except KeyboardInterrupt:
            stop.set()
            if thread.ident is not None:
                finished.wait()
            raise
        if isinstance(found[0], Exception):
            raise found[0]
        return found[0]

    def _working_memory(self, path: Path, logger: Any) -> int:  # noqa: ANN401 - TensorRT's logger
        """What a step of a new engine takes; raises BackendError if the engine does not even load."""
        runtime = self.trt.Runtime(logger)
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise BackendError(explain("loading the new engine", logger.errors))
        return working_memory(engine)

    def _read_timings(self, config: Any, path: Path) -> None:  # noqa: ANN401 - TensorRT's objects
        content = path.read_bytes() if path.is_file() else b""
        # One of another TensorRT or GPU is refused; then it begins anew.
        for serialized in (content, b""):
            cache = config.create_timing_cache(serialized)
            if cache is not None and config.set_timing_cache(cache, False):
                return

    def _write_timings(self, config: Any, path: Path) -> None:  # noqa: ANN401 - TensorRT's objects
        cache = config.get_timing_cache()
        if cache is None:
            return
        with stored_aside(path) as aside, aside.open("wb") as file:
            file.write(cache.serialize())


def _range(facts: ProfileFacts, tensor: str, axis: str) -> tuple[int, int, int]:
    if axis not in facts.axes:
        known = ", ".join(facts.axes) or "none"
        raise BackendError(
            f"profile {facts.name} has no sizes for the axis {axis or 'without a name'} of {tensor}, it knows {known}; "
            "export the bundle again, with --target tensorrt."
        )
    return facts.axes[axis]


def weights_of(graph: Path) -> int:
    """Bytes of a graph's external data."""
    data = graph.with_name(graph.name + ".data")
    return data.stat().st_size if data.is_file() else 0


def workspace_of(free: int, weights: int) -> int:
    """Bytes of workspace that a build can have, of what is free: the network and the engine hold the weights, too."""
    return max(LEAST_WORKSPACE, min(MOST_WORKSPACE, (free - 2 * weights) // 2))
