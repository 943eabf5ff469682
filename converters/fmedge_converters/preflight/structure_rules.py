"""Whether a graph is one at all: what TensorRT's parser refuses, or dies of, before it looks at any operator.

It sorts the nodes by itself, and takes any opset; so neither is looked at here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePath

import onnx
import onnx_ir as ir

from fmedge_converters.preflight.graph import Graph
from fmedge_converters.preflight.rule import Effect, Evidence, Finding

RAN: Evidence = "ran in TensorRT-RTX 1.7.1"
REQUIRED = onnx.defs.OpSchema.FormalParameterOption.Single
UNLIMITED = 2**31 - 1


def structure(graph: Graph) -> Iterator[Finding]:
    """What is wrong with inputs, outputs, order and weights of the graph as a whole."""
    inner = graph.model.graph
    if not inner.outputs:
        yield _finding("outputs", inner.name or "", "graph", "it has no output", "Name one")
    for value in inner.outputs:
        if not _is_made(value):
            yield _finding("outputs", str(value.name), "output", "nothing computes it", "Export it again")
    for value in inner.inputs:
        yield from _axes(value)
    for node in ir.traversal.RecursiveGraphIterator(inner):
        for given in dict.fromkeys(node.inputs):
            if given is not None and given.name and not _is_made(given):
                words = f"its input {given.name} is neither computed nor given"
                yield _finding("undefined-input", node.name or "", node.op_type, words, "Export it again")
    if _has_cycle(inner):
        yield _finding("order", inner.name or "", "graph", "its nodes wait for each other", "Export it again")
    for called in graph.recursive:
        words = "a local function calls itself, of which TensorRT-RTX dies"
        yield _finding("order", called, "function", words, "Write it as a Loop")
    yield from _weights(graph)


def misuse(node: ir.Node, opset: int) -> Iterator[Finding]:
    """What a node lacks of what ONNX's definition of its operator asks for."""

    def found(words: str, effect: Effect = "fails") -> Finding:
        return _finding("definition", node.name or "", node.op_type, words, "Export it again", effect)

    if not node.outputs:
        yield found("it has no output, of which TensorRT-RTX dies")
        return
    if node.domain not in ("", "ai.onnx"):
        return
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, "")
    except onnx.defs.SchemaError:
        return
    given = len(node.inputs)
    required = [
        formal.name
        for number, formal in enumerate(schema.inputs[: schema.min_input])
        if number >= given or (node.inputs[number] is None and formal.option == REQUIRED)
    ]
    if required or given < schema.min_input:
        yield found(f"its input {required[0] if required else schema.min_input} is missing")
    if schema.max_input < UNLIMITED and given > schema.max_input:
        yield found(f"it has {given} inputs, and opset {opset} knows {schema.max_input}")
    for name, attribute in schema.attributes.items():
        own = node.attributes.get(name)
        if own is None:
            if attribute.required:
                yield found(f"its attribute {name} is missing")
        elif not own.is_ref() and own.type.name != (wanted := str(attribute.type).rpartition(".")[2]):
            words = f"its attribute {name} is {own.type.name}, not {wanted}, and is not understood"
            yield found(words, "wrong")


def _finding(
    rule: str, node: str, operator: str, message: str, advice: str, effect: Effect = "fails", evidence: Evidence = RAN
) -> Finding:
    return Finding(rule, effect, node, operator, message, advice, evidence)


def _is_made(value: ir.Value) -> bool:
    return value.producer() is not None or value.is_graph_input() or value.is_initializer()


def _has_cycle(graph: ir.Graph) -> bool:
    try:
        graph.sort()
    except ValueError:
        return True
    return False


def _axes(value: ir.Value) -> Iterator[Finding]:
    if value.shape is None:
        yield _finding(
            "inputs",
            str(value.name),
            "input",
            "its rank is unknown",
            "Give it a shape",
            evidence="documentation",
        )
        return
    for axis, size in enumerate(value.shape):
        if (size < 0) if isinstance(size, int) else (size.value is None):
            words = f"axis {axis} is dynamic and has no name, so no profile can say its sizes"
            yield _finding("axes", str(value.name), "input", words, "Name the axis", evidence="documentation")


def _weights(graph: Graph) -> Iterator[Finding]:
    """Weights that are not what their shapes say, each file once."""
    seen: set[str] = set()
    for value in graph.model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            location = str(tensor.location)
            words = None if location in seen else _external(graph.path.parent, location, tensor)
            if words:
                seen.add(location)
        else:
            words = _inline(tensor)
        if words:
            yield _finding("weights", str(value.name), "initializer", words, "Copy the folder again")


def _external(folder: Path, location: str, tensor: ir.ExternalTensor) -> str | None:
    place = PurePath(location)
    if place.is_absolute() or ".." in place.parts:
        return f"its weights are in {location}, outside the folder of the graph, where no parser looks"
    data = folder / location
    needed = (tensor.offset or 0) + tensor.nbytes
    if not data.is_file() or data.stat().st_size < needed:
        return f"its weights are in {location}, which is missing or cut off"
    if tensor.length is not None and tensor.length != tensor.nbytes:
        return f"it has {tensor.length} bytes of weights in {location}, and its shape asks for {tensor.nbytes}"
    return None


def _inline(tensor: ir.TensorProtocol | None) -> str | None:
    raw = tensor.raw if isinstance(tensor, ir.TensorProtoTensor) else None
    if raw is None or tensor is None or not raw.HasField("raw_data") or len(raw.raw_data) == tensor.nbytes:
        return None
    return f"it has {len(raw.raw_data)} bytes of weights, and its shape asks for {tensor.nbytes}"
