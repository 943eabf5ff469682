"""Arithmetic in bfloat16 in the midst of a graph of another type, which ONNX Runtime's CPU provider has no kernels for.

PyTorch computes such an operation in fp32 and rounds its result to bfloat16. The graph does the same: every operand is
cast to fp32, which is exact, and the result back, which rounds it.
"""

from __future__ import annotations

import onnx_ir as ir

from fmedge_converters.graph import DecoderGraph

GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def compute_bfloat16_in_float32(graph: DecoderGraph, _context: int) -> int:
    """Surround operations on bfloat16 by casts; casts themselves, and bodies of loops, stay as they are."""
    changed = 0
    for node in list(graph.graph):
        places = [place for place, value in enumerate(node.inputs) if _is_bfloat16(value)]
        if not places or node.op_type == "Cast" or any(item.type in GRAPHS for item in node.attributes.values()):
            continue
        for place in places:
            value = node.inputs[place]
            assert value is not None  # it has a type
            (wide,) = graph.insert(
                node, "Cast", (value,), [(ir.DataType.FLOAT, value.shape)], {"to": ir.DataType.FLOAT}
            )
            node.replace_input_with(place, wide)
        for output in filter(_is_bfloat16, node.outputs):
            users = tuple(output.uses())
            rounded = ir.Value(type=output.type, shape=output.shape)
            cast = ir.node("Cast", [output], {"to": ir.DataType.BFLOAT16}, outputs=[rounded])
            graph.graph.insert_after(node, cast)
            output.type = ir.TensorType(ir.DataType.FLOAT)
            for user, place in users:
                user.replace_input_with(place, rounded)
        changed += 1
    return changed


def _is_bfloat16(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == ir.DataType.BFLOAT16
