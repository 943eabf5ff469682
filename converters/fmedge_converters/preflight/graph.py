"""A graph as the rules see it: nodes with those of their subgraphs, types and shapes of values, and small constants."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from fmedge_runtimes.errors import BundleError
from onnx_ir.passes import common

LARGEST_FILE = 1 << 31
"""Bytes that protobuf reads."""
SMALL = 1 << 16
"""Elements of a constant that a rule looks into."""


@dataclass(frozen=True, slots=True)
class Graph:
    """A graph, and where it is."""

    path: Path
    model: ir.Model

    def nodes(self) -> Iterator[ir.Node]:
        """All nodes, those of subgraphs and of the local functions that are called, too."""
        yield from ir.traversal.RecursiveGraphIterator(self.model.graph)
        for function in self._called()[0]:
            yield from ir.traversal.RecursiveGraphIterator(function)

    @property
    def recursive(self) -> tuple[str, ...]:
        """Names of local functions that call themselves."""
        return self._called()[1]

    def _called(self) -> tuple[tuple[ir.Function, ...], tuple[str, ...]]:
        """The functions that are called, and the names of those that call themselves."""
        found: dict[ir.Function, None] = {}
        recursive: dict[str, None] = {}

        def visit(inner: ir.Graph | ir.Function, callers: tuple[ir.Function, ...]) -> None:
            for node in ir.traversal.RecursiveGraphIterator(inner):
                function = self.model.functions.get(node.op_identifier())
                if function in callers:
                    recursive[node.op_type] = None
                elif function is not None and function not in found:
                    found[function] = None
                    visit(function, (*callers, function))

        if self.model.functions:
            visit(self.model.graph, ())
        return tuple(found), tuple(recursive)

    @property
    def functions(self) -> frozenset[tuple[str, str]]:
        """Domain and name of the functions that the model defines itself."""
        return frozenset((key[0], key[1]) for key in self.model.functions)


def read_graph(path: Path) -> Graph:
    """A graph, whose weights are not read. Raises BundleError when it is no ONNX file, or its weights are missing."""
    try:
        if path.stat().st_size >= LARGEST_FILE:
            raise BundleError(
                f"{path} is larger than 2 GiB, which no parser reads; store the weights as external data."
            )
        model = ir.load(path)
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}.") from error
    except BundleError:
        raise
    except Exception as error:  # protobuf's own, whatever it is
        raise BundleError(f"{path} is no ONNX graph: {_cause(error)}.") from error
    if not len(model.graph) and not model.graph.outputs:
        raise BundleError(f"{path} is no ONNX graph: it has neither nodes nor outputs.")
    graph = Graph(path, model)
    if any(value.dtype is None for node in graph.nodes() for value in node.outputs):
        # Without types half of the rules see nothing; what cannot be inferred stays unknown.
        try:
            with _silent("onnx_ir.passes.common"):
                graph = Graph(path, common.ShapeInferencePass()(model).model)
        except Exception:
            return graph
    return graph


def _cause(error: BaseException) -> str:
    """What went wrong first, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


@contextlib.contextmanager
def _silent(name: str) -> Iterator[None]:
    """Keep a logger from telling what is no news."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def dtype_of(value: ir.Value | None) -> ir.DataType | None:
    """The element type of a value; None if it is unknown."""
    return None if value is None else value.dtype


def shape_of(value: ir.Value | None) -> list[int | None] | None:
    """The sizes of a value, None where they are dynamic; None if even the rank is unknown."""
    if value is None or value.shape is None:
        return None
    return [size if isinstance(size, int) else None for size in value.shape]


def is_constant(value: ir.Value | None) -> bool:
    """Whether the value is in the file."""
    return value is not None and (value.is_initializer() or ir.convenience.get_const_tensor(value) is not None)


def constant_of(value: ir.Value | None) -> np.ndarray | None:
    """A small constant; None if the value is none, or a large one."""
    if value is None:
        return None
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.size > SMALL:
        return None
    try:
        return tensor.numpy()
    except (OSError, ValueError):  # the file of the weights is missing or cut off, which is found apart
        return None


def input_of(node: ir.Node, number: int) -> ir.Value | None:
    """An input that may be left out."""
    return node.inputs[number] if number < len(node.inputs) else None


def whole(node: ir.Node, name: str, default: int) -> int:
    """An attribute that is a whole number."""
    found = node.attributes.get(name)
    return default if found is None else int(found.as_int())


def text(node: ir.Node, name: str, default: str) -> str:
    """An attribute that is a text."""
    found = node.attributes.get(name)
    return default if found is None else str(found.as_string())
