"""The nodes of a traced decoder's ONNX graph as a Program.

Nodes know the module that they come from; the nodes of a layer stand together. Constants count as sources, named by
their content, because the exporter lets layers share those of the layers before them.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from fmedge_converters.decoder import TracedDecoder
from fmedge_converters.program import BEFORE, Operation, Program, Source
from fmedge_converters.program_of_step import named_source

SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True, slots=True)
class GraphProgram:
    """A graph as a program, and the nodes of each of its parts."""

    program: Program
    before: tuple[ir.Node, ...]
    """With all constants, wherever they stood."""
    layers: tuple[tuple[ir.Node, ...], ...]
    after: tuple[ir.Node, ...]


def graph_program(traced: TracedDecoder, layer_list: str, layers: int) -> GraphProgram | None:
    """Read a traced graph; None when its nodes cannot be told apart by layer."""
    parts = _parts(traced.model.graph, layer_list, layers)
    if parts is None:
        return None
    buffers = dict(traced.module.named_buffers())
    sources: dict[Hashable, Source] = {}
    for value in traced.model.graph.inputs:
        sources[value] = named_source(str(value.name), layer_list)
    for name, value in traced.model.graph.initializers.items():
        owned = named_source(module_name(name), layer_list)
        if name in traced.parameters or (owned.layer is not None and module_name(name) in buffers):
            sources[value] = owned
        else:
            sources[value] = Source(_content(value), None)
    operations = []
    for number, part in enumerate(parts):
        for node in part:
            if is_constant(node):
                sources[node.outputs[0]] = Source(_attributes(node), None)
                continue
            # A batch's size may be read from any layer's cache.
            inputs = () if reads_dimensions(node) and node.inputs[0] in sources else tuple(node.inputs)
            what = (node.domain, node.op_type, node.overload, _attributes(node), _shapes(node))
            operations.append(Operation(what, inputs, tuple(node.outputs), number + BEFORE))
    for value in traced.model.graph.outputs:
        source = named_source(str(value.name), layer_list)
        layer = layers if source.layer is None else source.layer
        operations.append(Operation(("output", source.name), (value,), (), layer))
    constants = [node for part in parts[1:] for node in part if is_constant(node)]
    before, *rest = parts
    kept = [tuple(node for node in part if not is_constant(node)) for part in rest]
    return GraphProgram(Program(operations, sources, layers), (*before, *constants), tuple(kept[:-1]), kept[-1])


def module_name(initializer: str) -> str:
    """The name in the model of a parameter or buffer, by that of its initializer."""
    return initializer.removeprefix("model.")


def is_constant(node: ir.Node) -> bool:
    """Whether a node is a Constant."""
    return node.op_type == "Constant" and not node.domain


def reads_dimensions(node: ir.Node) -> bool:
    """Whether a node is a Shape."""
    return node.op_type == "Shape" and not node.domain


def _parts(graph: ir.Graph, layer_list: str, layers: int) -> list[list[ir.Node]] | None:
    """Nodes before the layers, of each layer, and behind them."""
    pattern = re.compile(rf"'model\.{re.escape(layer_list)}\.(\d+)['.]")
    nodes = list(graph)
    found = [pattern.search(node.metadata_props.get(SCOPES, "")) for node in nodes]
    numbers = [None if match is None else int(match.group(1)) for match in found]
    first = {number: index for index, number in reversed(list(enumerate(numbers))) if number is not None}
    if sorted(first) != list(range(layers)):
        return None
    last = max(index for index, number in enumerate(numbers) if number is not None)
    bounds = [0, *(first[layer] for layer in range(layers)), last + 1, len(nodes)]
    if bounds != sorted(bounds):
        return None
    parts = [nodes[start:stop] for start, stop in itertools.pairwise(bounds)]
    for layer, part in enumerate(parts[1:-1]):
        if any(number not in (None, layer) for number in numbers[first[layer] : first[layer] + len(part)]):
            return None
    return parts


def _attributes(node: ir.Node) -> str:
    """All attributes of a node; subgraphs and tensors by their content."""
    texts = []
    for name, attribute in sorted(node.attributes.items()):
        value = attribute.value
        if isinstance(value, ir.TensorProtocol):
            text = f"{value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
        else:
            text = repr(value)
        texts.append(f"{name}={attribute.type}:{text}")
    return ", ".join(texts)


def _shapes(node: ir.Node) -> str:
    return ", ".join(f"{value.dtype}{value.shape}" for value in node.outputs)


def _content(value: ir.Value) -> str:
    tensor = value.const_value
    if tensor is None:
        return f"unknown {value.name}"
    array = np.ascontiguousarray(tensor.numpy())
    return f"{tensor.dtype} {list(array.shape)} {hashlib.sha256(array.tobytes()).hexdigest()}"
