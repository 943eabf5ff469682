"""A residual addition and the RMS normalization after it in one node: SkipSimplifiedLayerNormalization."""

from __future__ import annotations

from fmedge_converters.graph import MICROSOFT, DecoderGraph, dims, produced_by, replace


def fuse_skip_norms(graph: DecoderGraph, _context: int) -> int:
    """Fuse norm(a + b); the sum, which the next residual needs, is the node's fourth output."""
    changed = 0
    for node in list(graph.graph):
        if node.op_type != "SimplifiedLayerNormalization" or node.domain:
            continue
        addition = produced_by(node.inputs[0], "Add")
        if addition is None:
            continue
        left, right = addition.inputs
        gamma = node.inputs[1]
        total, normed = addition.outputs[0], node.outputs[0]
        # Without broadcasting, and in the shape that the kernel takes.
        if left is None or right is None or dims(left) != dims(right) or len(dims(left) or ()) != 3:
            continue
        # The kernel has one type for all; some models norm in fp32 around layers in fp16.
        if gamma is None or len({left.dtype, right.dtype, gamma.dtype, normed.dtype}) != 1:
            continue
        # The node must stand behind both of its inputs and in front of every user of the sum.
        new_normed, _, _, new_total = graph.insert(
            addition,
            "SkipSimplifiedLayerNormalization",
            (left, right, gamma),
            [(normed.dtype, normed.shape), (None, None), (None, None), (total.dtype, total.shape)],
            {"epsilon": node.attributes.get_float("epsilon", 1e-5)},
            MICROSOFT,
        )
        replace(normed, new_normed)
        replace(total, new_total)
        changed += 1
    graph.remove_unused()
    return changed
