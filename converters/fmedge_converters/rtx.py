"""TensorRT-RTX's parser and builder, which run on a machine without a GPU (`pip install "fmedge[rtx]"`).

    parse(Path("decoder.onnx"))                 # () or what the parser refuses, node by node
    build(Path("decoder.onnx"), profiles)       # an engine, or what the builder said

TensorRT-RTX is a sibling of TensorRT, not the same: that it takes a graph is the nearest evidence there is without the
device, and proves nothing about numbers or speed. An engine made here is for the RTX runtime on the GPUs of CAPABILITY.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fmedge_runtimes.errors import BackendError

PACKAGES = ("onnxruntime_ep_nv_tensorrt_rtx", "tensorrt_rtx_bindings")
"""The first has the libraries, the second what calls them."""
CAPABILITY = "SM86"
"""Compute capability to build for: Ampere, the nearest to Orin of those that the builder knows."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What the parser or the builder refuses."""

    message: str
    """In TensorRT's words."""
    node: str = ""
    """Name of the node in the graph; empty where the builder does not say."""
    operator: str = ""

    def __str__(self) -> str:
        where = f"{self.operator} {self.node}: " if self.operator else ""
        return where + self.message


@dataclass(frozen=True, slots=True)
class Built:
    """What came of a build: an engine, or the problems."""

    engine: bytes | None
    problems: tuple[Problem, ...]


class Profile(Protocol):
    """Sizes to build for; `bundle.ProfileFacts` is one."""

    @property
    def name(self) -> str: ...
    @property
    def axes(self) -> Mapping[str, tuple[int, int, int]]:
        """The least, usual and largest size of each dynamic axis."""
        ...


def is_available() -> bool:
    """Whether the packages are installed."""
    return all(importlib.util.find_spec(name) is not None for name in PACKAGES)


def parse(graph: Path) -> tuple[Problem, ...]:
    """What the parser refuses in a graph with its weights beside it; empty if it takes all of it.

    Raises BackendError when the packages are not installed, or the file is no ONNX graph.
    """
    with _network(graph) as network:
        return network.problems


def build(graph: Path, profiles: Sequence[Profile], capability: str = CAPABILITY) -> Built:
    """Build an engine of a graph for a compute capability, strongly typed, with those profiles.

    Raises BackendError as `parse` does, and for a capability that the builder does not know, or a dynamic axis that a
    profile leaves out.
    """
    with _network(graph) as network:
        if network.problems:
            return Built(None, network.problems)
        return network.build(profiles, capability)


class _Network:
    """A parsed graph, while its objects live."""

    def __init__(self, trt: Any, graph: Path) -> None:  # noqa: ANN401 - the bindings have no types
        self._trt = trt
        self._said = _collector(trt)
        self._builder = trt.Builder(self._said)
        self._network = self._builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        # It keeps the weights that the network points to.
        self._parser = trt.OnnxParser(self._network, self._said)
        parsed = self._parser.parse_from_file(os.fspath(graph))
        errors = [self._parser.get_error(number) for number in range(self._parser.num_errors)]
        self.problems = tuple(_problem(error) for error in errors)
        if not parsed and not self.problems:
            words = "; ".join(self._said.errors) or "no reason given"
            raise BackendError(f"TensorRT-RTX cannot read {graph}: {words}.")

    def build(self, profiles: Sequence[Profile], capability: str) -> Built:
        trt, config = self._trt, self._builder.create_builder_config()
        known = trt.ComputeCapability.__members__
        if capability not in known:
            raise BackendError(
                f"TensorRT-RTX has no compute capability {capability}; choose one of {', '.join(known)}."
            )
        config.num_compute_capabilities = 1
        config.set_compute_capability(known[capability], 0)
        for profile in profiles:
            self._add_profile(config, profile)
        self._said.errors.clear()
        engine = self._builder.build_serialized_network(self._network, config)
        if engine is None:
            return Built(None, tuple(Problem(message) for message in self._said.errors or ["no reason given"]))
        return Built(bytes(engine), ())

    def _add_profile(self, config: Any, profile: Profile) -> None:  # noqa: ANN401 - the bindings have no types
        made = self._builder.create_optimization_profile()
        for number in range(self._network.num_inputs):
            tensor = self._network.get_input(number)
            axes = [self._sizes(tensor, axis, size, profile) for axis, size in enumerate(tuple(tensor.shape))]
            if any(len(set(sizes)) > 1 or size == -1 for sizes, size in zip(axes, tuple(tensor.shape), strict=True)):
                least, usual, largest = (tuple(sizes[kind] for sizes in axes) for kind in range(3))
                made.set_shape(tensor.name, least, usual, largest)
        config.add_optimization_profile(made)

    @staticmethod
    def _sizes(tensor: Any, axis: int, size: int, profile: Profile) -> tuple[int, int, int]:  # noqa: ANN401 - the bindings have no types
        if size != -1:
            return size, size, size
        name = tensor.get_dimension_name(axis)
        if name not in profile.axes:
            raise BackendError(f"profile {profile.name} has no sizes for {name}, an axis of the input {tensor.name}.")
        return profile.axes[name]


@contextlib.contextmanager
def _network(graph: Path) -> Iterator[_Network]:
    if not is_available():
        raise BackendError("TensorRT-RTX is not installed: pip install 'fmedge[rtx]' (Linux on x86-64).")
    import onnxruntime_ep_nv_tensorrt_rtx  # loads the libraries
    import tensorrt_rtx_bindings as trt

    del onnxruntime_ep_nv_tensorrt_rtx
    yield _Network(trt, graph)


def _problem(error: Any) -> Problem:  # noqa: ANN401 - the bindings have no types
    return Problem(" ".join(error.desc().split()), error.node_name(), error.node_operator())


def _collector(trt: Any) -> Any:  # noqa: ANN401 - the bindings have no types
    """A logger that keeps the errors; its class cannot be named before the bindings are imported."""

    class Collector(trt.ILogger):  # type: ignore[misc]  # the bindings have no types
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:  # noqa: ANN401 - an enumeration of the bindings
            """Called by TensorRT."""
            if int(severity) <= int(trt.ILogger.ERROR):
                self.errors.append(" ".join(message.split()))

    return Collector()
