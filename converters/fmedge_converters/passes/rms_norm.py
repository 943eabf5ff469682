"""RMS normalization in one node: ONNX Runtime's SimplifiedLayerNormalization.

onnxscript's rules find the pattern; ORT has its fast kernel under the older name, which is in the default domain.
"""

from __future__ import annotations

import numpy as np
from onnxscript.rewriter.rules.fusion._rms_normalization import rms_normalization_ruleset

from fmedge_converters.graph import DecoderGraph, dims, integers, produced_by, replace


def fuse_rms_norms(graph: DecoderGraph, _context: int) -> int:
    """Fuse x * rsqrt(mean(x ** 2) + epsilon) * weight."""
    _count_last_axes_from_the_end(graph)
    rms_normalization_ruleset.apply_to_model(graph.model)
    changed = 0
    for node in list(graph.graph):
        if node.op_type != "RMSNormalization" or node.domain:
            continue
        source, output = node.inputs[0], node.outputs[0]
        swap = produced_by(source, "Transpose")
        keeps_last = swap is not None and list(swap.attributes.get_ints("perm", []))[-1:] == [3]
        if swap is not None and keeps_last:
            # A norm over the last axis may as well run before the heads move, next to the projection.
            source = swap.inputs[0]
        like = source if source is not None else output
        (normed,) = graph.insert(
            node,
            "SimplifiedLayerNormalization",
            (source, node.inputs[1]),
            [(output.dtype, like.shape)],
            {
                "axis": -1,
                "epsilon": node.attributes.get_float("epsilon", 1e-5),
                "stash_type": node.attributes.get_int("stash_type", 1),
            },
        )
        if swap is not None and keeps_last:
            perm = list(swap.attributes.get_ints("perm", []))
            shape = swap.outputs[0].shape
            (normed,) = graph.insert(node, "Transpose", (normed,), [(output.dtype, shape)], {"perm": perm})
        replace(output, normed)
        changed += 1
    graph.remove_unused()
    return changed


def _count_last_axes_from_the_end(graph: DecoderGraph) -> None:
    """Means over the last axis by its number become means over axis -1, which is all that the rules know."""
    for node in graph.graph:
        if node.op_type != "ReduceMean" or node.domain or len(node.inputs) != 2 or node.inputs[0] is None:
            continue
        shape, axes = dims(node.inputs[0]), integers(node.inputs[1])
        if shape is not None and axes == [len(shape) - 1]:
            node.replace_input_with(1, graph.add_constant("axes.-1", np.array([-1], np.int64)))
