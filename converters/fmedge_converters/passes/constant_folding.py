"""Constant folding, common subexpressions and unused nodes, by onnxscript's optimizer."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer
from onnxscript.rewriter import _DEFAULT_REWRITE_RULES, rewrite
from onnxscript.rewriter.rules.common import slice_split_rule

from fmedge_converters.graph import DecoderGraph

LARGEST = 1 << 16
"""Elements of a constant that may be folded. Norm weights fold (gemma adds 1 to them); matrices never."""
RULES = [rule for rule in _DEFAULT_REWRITE_RULES if rule is not slice_split_rule]
"""Without the one that looks at all pairs of slices, which is quadratic, and whose form torch does not export."""


def _reads_matrix(graph: DecoderGraph, node: ir.Node) -> bool:
    weights = (graph.weight(value) for value in node.inputs)
    return any(weight is not None and len(weight.shape) > 1 for weight in weights)


def fold_constants(graph: DecoderGraph, _context: int) -> int:
    """Fold what does not depend on an input, then drop casts, slices and additions that change nothing."""
    before = len(graph.graph)
    common.InlinePass()(graph.model)
    optimizer.fold_constants(
        graph.model,
        onnx_shape_inference=True,
        input_size_limit=LARGEST,
        output_size_limit=LARGEST,
        should_fold=lambda node: False if _reads_matrix(graph, node) else None,
    )
    common.RemoveUnusedNodesPass()(graph.model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(graph.model)
    common.DeduplicateInitializersPass(size_limit=LARGEST)(graph.model)
    common.CommonSubexpressionEliminationPass()(graph.model)
    # The rules come last: they are slow, and most nodes are gone by now.
    rewrite(graph.model, RULES)
    common.IdentityEliminationPass()(graph.model)
    graph.remove_unused()
    for name in set(graph.weights) - set(graph.graph.initializers):
        del graph.weights[name]
    return before - len(graph.graph)
