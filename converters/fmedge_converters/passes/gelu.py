"""Gelu in the operators that it is made of, for runtimes that do not know it by name.

x * (1 + erf(x / sqrt(2))) / 2, or with tanh(sqrt(2 / pi) * (x + 0.044715 * x ** 3)) in place of erf:
https://arxiv.org/abs/1606.08415.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from fmedge_converters.graph import DecoderGraph, replace


def decompose_gelu(graph: DecoderGraph, _context: int) -> int:
    """Write every Gelu in plain operators; returns how many there were."""
    found = [node for node in graph.graph if node.op_type == "Gelu" and not node.domain]
    for node in found:
        _decompose(graph, node)
    graph.remove_unused()
    return len(found)


def _decompose(graph: DecoderGraph, node: ir.Node) -> None:
    x, output = node.inputs[0], node.outputs[0]
    if x is None or x.dtype is None:
        raise RuntimeError("a Gelu without an input")
    dtype, like = x.dtype, (output.dtype, output.shape)

    def number(value: float) -> ir.Value:
        return graph.add_constant(f"gelu.{dtype.name}.{value!r}", np.array(value, dtype.numpy()))

    def emit(op: str, *inputs: ir.Value) -> ir.Value:
        (made,) = graph.insert(node, op, inputs, [like])
        return made

    if node.attributes.get_string("approximate", "none") == "tanh":
        cube = emit("Mul", emit("Mul", x, x), x)
        inner = emit("Add", x, emit("Mul", cube, number(0.044715)))
        curve = emit("Tanh", emit("Mul", inner, number(math.sqrt(2 / math.pi))))
    else:
        curve = emit("Erf", emit("Mul", x, number(math.sqrt(0.5))))
    half = emit("Mul", x, number(0.5))
    replace(output, emit("Mul", half, emit("Add", curve, number(1.0))))
