"""Whether a graph may write a new state over the old one: then a runtime keeps one buffer, and copies nothing.

It may if the old state has been read by the time the new one is written. A node that the writer depends on has run; the
writer itself must be an operator that is known to read first.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

VIEWS = ("Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten")
"""Operators whose output may be the memory of their input."""


def updates_in_place(graph: ir.Graph, past: ir.Value, present: ir.Value, read_first: frozenset[str]) -> bool:
    """Whether `past`, an input of the graph, and `present`, an output, may be the same memory.

    `read_first`: operators of the backend that read a whole state before they write the next one.
    """
    writer = present.producer()
    if writer is None:
        return past is present
    before = _ancestors(writer)
    states = {past}
    for node in graph:
        if states.isdisjoint(_reads(node)):
            continue
        if node is writer:
            if not _reads_first(node, states, present, read_first):
                return False
        elif node.op_type in VIEWS and not node.domain:
            states.update(node.outputs)
        elif node not in before:
            return False
    return True


def _reads_first(writer: ir.Node, states: set[ir.Value], present: ir.Value, read_first: frozenset[str]) -> bool:
    if writer.op_type in read_first:
        return True
    if writer.op_type != "Scan":
        return False
    # Its first step reads the old state, its last one writes the new one, and they may be the same step.
    index = present.index()
    body = writer.attributes["body"].as_graph()
    alone = [position for position, value in enumerate(writer.inputs) if value in states] == [index]
    return (
        alone
        and index is not None
        and states.isdisjoint(_inner_reads(writer))
        and updates_in_place(body, body.inputs[index], body.outputs[index], read_first)
    )


def _ancestors(node: ir.Node) -> set[ir.Node]:
    """The nodes that a node depends on."""
    found: set[ir.Node] = set()
    waiting = [node]
    while waiting:
        for value in _reads(waiting.pop()):
            producer = value.producer()
            if producer is not None and producer not in found:
                found.add(producer)
                waiting.append(producer)
    return found


def _reads(node: ir.Node) -> Iterator[ir.Value]:
    """What a node takes, what its subgraphs take from outside included."""
    yield from (value for value in node.inputs if value is not None)
    yield from _inner_reads(node)


def _inner_reads(node: ir.Node) -> Iterator[ir.Value]:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.as_graph():
                yield from _reads(inner)
