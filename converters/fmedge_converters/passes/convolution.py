"""The convolutions of a graph whose kernel is a weight, read."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from fmedge_converters.graph import DecoderGraph


@dataclass(frozen=True, slots=True)
class Convolution:
    """A Conv node over images, without groups."""

    node: ir.Node
    x: ir.Value  # [B, C, H, W]
    weight: ir.Value  # [O, C, h, w]
    bias: ir.Value | None  # [O]
    output: ir.Value  # [B, O, H', W']

    @property
    def name(self) -> str:
        """The name of its weight, by which what is made from it is named."""
        return str(self.weight.name)


def convolutions(graph: DecoderGraph) -> list[Convolution]:
    """All of them that have a weight [O, C, h, w] and one group, in the order of the graph."""
    found = []
    for node in graph.graph:
        if node.domain or node.op_type != "Conv" or node.attributes.get_int("group", 1) != 1:
            continue
        x, weight, *bias = node.inputs
        known = graph.weight(weight)
        if x is None or weight is None or known is None or len(known.shape) != 4:
            continue
        if bias and bias[0] is not None and graph.weight(bias[0]) is None:
            continue
        found.append(Convolution(node, x, weight, bias[0] if bias else None, node.outputs[0]))
    return found
