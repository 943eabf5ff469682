"""RMS normalization in one node: ONNX Runtime's SimplifiedLayerNormalization.

onnxscript's rules find the pattern; ORT has its fast kernel under the older name, which is in the default domain.
"""

from __future__ import annotations

from onnxscript.rewriter.rules.fusion._rms_normalization import rms_normalization_ruleset

from fmedge_converters.graph import DecoderGraph, replace


def fuse_rms_norms(graph: DecoderGraph, _context: int) -> int:
    """Fuse x * rsqrt(mean(x ** 2) + epsilon) * weight."""
    rms_normalization_ruleset.apply_to_model(graph.model)
    changed = 0
    for node in list(graph.graph):
        if node.op_type != "RMSNormalization" or node.domain:
            continue
        source, output = node.inputs[0], node.outputs[0]
        (normed,) = graph.insert(
            node,
            "SimplifiedLayerNormalization",
            node.inputs,
            [(output.dtype, output.shape)],
            {
                "axis": -1,
                "epsilon": node.attributes.get_float("epsilon", 1e-5),
                "stash_type": node.attributes.get_int("stash_type", 1),
            },
        )
        if output.shape is None and source is not None:
            normed.shape = source.shape
        replace(output, normed)
        changed += 1
    graph.remove_unused()
    return changed
