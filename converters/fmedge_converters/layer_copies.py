"""The graph of a deep decoder from that of a shallow one: copies of its layers, one behind the other."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from fmedge_converters.decoder import TracedDecoder
from fmedge_converters.program import exports, invariants
from fmedge_converters.program_of_graph import GraphProgram, is_constant, module_name, reads_dimensions
from fmedge_converters.program_of_step import StepProgram, named_source


def copy_layers(
    traced: TracedDecoder, program: GraphProgram, order: Sequence[int], whole: StepProgram
) -> TracedDecoder | None:
    """The graph in which layer number i is a copy of layer order[i] of the traced one.

    None when its layers share values with one that is not copied.
    """
    copier = _Copier(traced, program, order, whole)
    try:
        copier.copy_nodes()
    except _NotCopied:
        return None
    graph = ir.Graph(
        copier.ends(traced.model.graph.inputs),
        copier.ends(traced.model.graph.outputs),
        nodes=copier.nodes,
        initializers=list(copier.initializers.values()),
        opset_imports=traced.model.graph.opset_imports,
        name=traced.model.graph.name,
    )
    model = ir.Model(graph, ir_version=traced.model.ir_version, functions=list(traced.model.functions.values()))
    return TracedDecoder(model, whole.module, whole.caches, whole.states, copier.parameters)


class _NotCopied(LookupError):
    """A layer shares a value with one that is not copied."""


class _Copier:
    """The copies of one graph's nodes and values."""

    def __init__(self, traced: TracedDecoder, program: GraphProgram, order: Sequence[int], whole: StepProgram) -> None:
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.parameters: dict[str, str] = {}
        self._traced = traced
        self._parts = program
        self._sources = program.program.sources
        self._order = order
        self._list = str(whole.layer_list)
        self._buffers = dict(whole.module.named_buffers())
        self._made_in = {
            value: layer for layer, nodes in enumerate(program.layers) for node in nodes for value in node.outputs
        }
        self._common = invariants(program.program)
        self._exports = exports(program.program, self._common)
        self._shared: dict[ir.Value, ir.Value] = {}
        """Copies of what does not belong to a layer."""
        self._inputs: dict[str, ir.Value] = {}
        self._made: list[dict[ir.Value, ir.Value]] = []
        """For each new layer the copies that were made in it, by their originals."""

    def copy_nodes(self) -> None:
        """Fill `nodes`, `initializers` and `parameters`."""
        # Constants first: those of a layer serve all of its copies.
        for node in sorted(self._parts.before, key=lambda node: not is_constant(node)):
            self._copy(node, -1, -1)
        for number, original in enumerate(self._order):
            self._made.append({})
            for node in self._parts.layers[original]:
                self._copy(node, number, original)
        for node in self._parts.after:
            self._copy(node, len(self._order), len(self._parts.layers))

    def ends(self, values: Sequence[ir.Value]) -> list[ir.Value]:
        """Inputs or outputs of the new graph, those of the layers in the order of the layers."""
        found: list[ir.Value] = []
        done: set[str] = set()
        for value in values:
            block = str(value.name).split(".")[0]
            if block in done:
                continue
            done.add(block)
            members = [item for item in values if str(item.name).split(".")[0] == block]
            owners = [named_source(str(item.name), self._list).layer for item in members]
            if owners == [None]:
                found.append(self._end(value, len(self._order), len(self._parts.layers)))
                continue
            for number, original in enumerate(self._order):
                found += [
                    self._end(item, number, original)
                    for item, owner in zip(members, owners, strict=True)
                    if owner == original
                ]
        return found

    def _end(self, value: ir.Value, number: int, original: int) -> ir.Value:
        if value.is_graph_input():
            return self._source(value, number)
        copied = self._operand(value, number, original)
        if copied is None:
            raise RuntimeError("an output that nothing makes")
        source = named_source(str(value.name), self._list)
        copied.name = source.name.format(number)
        return copied

    def _copy(self, node: ir.Node, number: int, original: int) -> None:
        dimensions = reads_dimensions(node)
        inputs = [self._operand(value, number, original, dimensions) for value in node.inputs]
        inside = 0 <= number < len(self._order)
        outputs = []
        for value in node.outputs:
            copied = _like(value, f"layers.{number}.{value.name}" if inside else str(value.name))
            (self._made[number] if inside else self._shared)[value] = copied
            outputs.append(copied)
        attributes = list(node.attributes.values())
        self.nodes.append(
            ir.Node(node.domain, node.op_type, inputs, attributes, overload=node.overload, outputs=outputs)
        )

    def _operand(self, value: ir.Value | None, number: int, original: int, dimensions: bool = False) -> ir.Value | None:
        """The copy of a value for a node that is copied from layer `original` to layer `number`."""
        if value is None:
            return None
        if value in self._shared:
            return self._shared[value]
        source = self._sources.get(value)
        if source is not None:
            if source.layer is None or source.layer == original:
                return self._source(value, number)
            # Dimensions of another layer's cache are those of any copy of that layer.
            return self._source(value, self._first_copy(source.layer) if dimensions else source.layer)
        made_in = self._made_in[value]
        if made_in == original:
            return self._made[number][value]
        if value in self._common:
            return self._made[self._first_copy(made_in)][value]
        earlier = number - (original - made_in)
        rank = self._exports[made_in].index(value)
        twin = self._exports[self._order[earlier]][rank]
        if not isinstance(twin, ir.Value):
            raise TypeError("the values of a graph's program are those of the graph")
        return self._made[earlier][twin]

    def _first_copy(self, original: int) -> int:
        """The first new layer that is a copy of a traced one."""
        if original not in self._order:
            raise _NotCopied
        return self._order.index(original)

    def _source(self, value: ir.Value, number: int) -> ir.Value:
        """The input or initializer of layer `number` that is copied from this one."""
        given = str(value.name)
        is_input = value.is_graph_input()
        stem = given if is_input else module_name(given)
        source = self._sources[value]  # a constant that a layer's code makes belongs to no layer
        name = given if source.layer is None else given.removesuffix(stem) + source.name.format(number)
        known = self._inputs if is_input else self.initializers
        if name not in known:
            known[name] = _like(value, name)
            known[name].const_value = value.const_value
            if given in self._traced.parameters:
                self.parameters[name] = module_name(name)
            elif not is_input and source.layer is not None:
                known[name].const_value = ir.tensor(self._buffers[module_name(name)], name=name)
        return known[name]


def _like(value: ir.Value, name: str) -> ir.Value:
    shape = None if value.shape is None else ir.Shape(list(value.shape))
    return ir.Value(name=name, type=value.type, shape=shape)
