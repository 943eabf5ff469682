"""A decoder's graph with its weights attached, as the passes see it.

The ONNX graph holds a lazy tensor for each parameter; `weights` holds the same as a `Weight`, which passes can
concatenate, transpose or quantize without reading it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from fmedge_converters.weight import Array, Weight, weight_from_array

MICROSOFT = "com.microsoft"


@dataclass(frozen=True, slots=True)
class DecoderGraph:
    """An ONNX graph, and the weights of its initializers by their names."""

    model: ir.Model
    weights: dict[str, Weight]
    input_ranges: dict[str, float] = field(default_factory=dict)
    """The largest magnitude that a product's input has on calibration text, by the name of the product's weight."""

    @property
    def graph(self) -> ir.Graph:
        """The graph of the model."""
        return self.model.graph

    def weight(self, value: ir.Value | None) -> Weight | None:
        """The weight behind a value, None if it is no parameter."""
        return self.weights.get(value.name) if value is not None and value.name is not None else None

    def add_weight(
        self, name: str, weight: Weight, stored: tuple[ir.DataType, Sequence[int]] | None = None
    ) -> ir.Value:
        """Register a weight as an initializer (once: the same name gives the same initializer).

        `stored`: the ONNX type and shape of a tensor whose bytes the weight has, where numpy has no such type.
        """
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        dtype, shape = (ir.DataType.from_numpy(weight.dtype), weight.shape) if stored is None else stored

        def read() -> ir.TensorProtocol:
            array = weight.array()
            return ir.PackedTensor(array.reshape(-1), dtype, shape=shape) if dtype.itemsize < 1 else ir.tensor(array)

        tensor = ir.LazyTensor(
            read,
            dtype=dtype,
            shape=ir.Shape(shape),
            name=name,
        )
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        self.graph.register_initializer(value)
        self.weights[name] = weight
        return value

    def add_constant(self, name: str, array: Array) -> ir.Value:
        """Register a small array as an initializer."""
        return self.add_weight(name, weight_from_array(array))

    def insert(  # the attributes of an ONNX node
        self,
        before: ir.Node,
        op: str,
        inputs: Sequence[ir.Value | None],
        like: Sequence[tuple[ir.DataType | None, Sequence[int | str | ir.SymbolicDim] | ir.Shape | None]],
        attributes: Mapping[str, int | float | str | Sequence[int] | ir.TensorProtocol | ir.Graph] | None = None,
        domain: str = "",
    ) -> tuple[ir.Value, ...]:
        """Insert a node in front of another; `like` gives dtype and shape of each output."""
        outputs = [
            ir.Value(
                type=None if dtype is None else ir.TensorType(dtype),
                shape=None if shape is None else ir.Shape(shape),
            )
            for dtype, shape in like
        ]
        node = ir.node(op, inputs, dict(attributes or {}), domain=domain, outputs=outputs)
        self.graph.insert_before(before, node)
        if domain:
            self.graph.opset_imports.setdefault(domain, 1)
        return tuple(node.outputs)

    def remove_unused(self) -> None:
        """Drop nodes and initializers that no output depends on."""
        for node in reversed(list(self.graph)):
            if not any(output.uses() or output.is_graph_output() for output in node.outputs):
                self.graph.remove(node, safe=True)
        for name, value in list(self.graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del self.graph.initializers[name]
                self.weights.pop(name, None)


def replace(old: ir.Value, new: ir.Value) -> None:
    """Let every user of `old`, the graph's outputs included, use `new`; an output keeps its name."""
    if old.is_graph_output() and old.name is not None:
        new = _free(old, new)
        old.name, new.name = None, old.name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def _free(old: ir.Value, new: ir.Value) -> ir.Value:
    """`new`, or a copy of it where it has a name that it must keep."""
    producer = old.producer()
    if not (new.is_graph_input() or new.is_graph_output() or new.is_initializer()) or producer is None:
        return new
    copy = ir.node("Identity", [new])
    (made,) = copy.outputs
    made.type, made.shape = new.type, new.shape
    if isinstance(producer.graph, ir.Graph):
        producer.graph.insert_after(producer, copy)
    return made


def produced_by(value: ir.Value | None, op: str, domain: str = "") -> ir.Node | None:
    """The node that computes a value, if it is that operator."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op and node.domain == domain else None


def constant(value: ir.Value | None, largest: int = 1 << 16) -> Array | None:
    """The array of a constant or of a small initializer; None if the value is computed, or larger than `largest`."""
    if value is None or value.is_graph_input():
        return None
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.size > largest:
        return None
    return np.asarray(tensor.numpy())


def integers(value: ir.Value | None) -> list[int] | None:
    """The elements of a constant, as integers."""
    array = constant(value)
    return None if array is None else [int(item) for item in array.reshape(-1)]


def dims(value: ir.Value) -> list[int | str] | None:
    """The shape of a value: numbers, and names of dynamic axes; None if it is not known."""
    if value.shape is None or any(isinstance(dim, ir.SymbolicDim) and dim.value is None for dim in value.shape):
        return None
    return [dim if isinstance(dim, int) else str(dim) for dim in value.shape]
