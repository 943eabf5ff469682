"""Constant folding, common subexpressions and unused nodes, by onnxscript's optimizer."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer
from onnxscript.rewriter import _DEFAULT_REWRITE_RULES, rewrite
from onnxscript.rewriter.rules.common import slice_split_rule
from onnxscript.rewriter.rules.common._no_op import rules as no_op_rules

from fmedge_converters.graph import DecoderGraph, constant, replace

LARGEST = 1 << 16
"""Elements of a constant that may be folded. Norm weights fold (gemma adds 1 to them); matrices never."""
RULES = [rule for rule in _DEFAULT_REWRITE_RULES if rule is not slice_split_rule and rule not in [*no_op_rules]]
"""Without the one that looks at all pairs of slices, which is quadratic, and whose form torch does not export; and
without those that take 1e-15, which keeps a division from being 0 / 0, for zero (`drop_no_ops` is exact)."""
NEUTRAL = {"Add": 0, "Sub": 0, "Mul": 1, "Div": 1}
"""Operators, and the second operand with which they change nothing; with Add and Mul, the first one too."""


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
    drop_no_ops(graph)
    rewrite(graph.model, RULES)
    common.IdentityEliminationPass()(graph.model)
    graph.remove_unused()
    for name in set(graph.weights) - set(graph.graph.initializers):
        del graph.weights[name]
    return before - len(graph.graph)


def drop_no_ops(graph: DecoderGraph) -> None:
    """Drop additions of exactly zero and products with exactly one."""
    for node in graph.graph:
        if node.domain or node.op_type not in NEUTRAL:
            continue
        pairs = [(node.inputs[0], node.inputs[1])]
        if node.op_type in ("Add", "Mul"):
            pairs.append((node.inputs[1], node.inputs[0]))
        for kept, other in pairs:
            array = None if kept is None else constant(other, 1)
            if kept is None or array is None or array.size != 1 or array.item() != NEUTRAL[node.op_type]:
                continue
            # A constant of more dimensions adds them.
            if kept.shape is not None and array.ndim <= len(kept.shape):
                replace(node.outputs[0], kept)
                break
