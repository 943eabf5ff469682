"""The plain form of a mixture of experts: a Split of the sorted rows, a Linear for each expert, a Concat.

Every scheme spells it, whatever the activation between the products, and an expert without rows costs one empty
product. A scheme whose target has a kernel for a whole mixture replaces the mixture before (schemes/qmoe.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from fmedge_converters.graph import DecoderGraph, dims, replace
from fmedge_converters.passes.linear import insert_linear
from fmedge_converters.passes.mixture import ExpertLinear, Mixture, expert_linears, mixtures, stack_of_matrices
from fmedge_converters.weight import Weight, permuted, selected


def expand_experts(graph: DecoderGraph) -> None:
    """Write all mixtures in their plain form; so are stacks of products, with which a model runs all of its experts."""
    for linear in expert_linears(graph):
        _expand_linear(graph, linear)
    for mixture in mixtures(graph):
        _expand_combination(graph, mixture)
    for node in list(graph.graph):
        if node.op_type == "MatMul" and not node.domain:
            _expand_stack(graph, node)
    graph.remove_unused()


def _expand_linear(graph: DecoderGraph, linear: ExpertLinear) -> None:
    experts, _, size = linear.weight.shape
    like = [(linear.rows.dtype, ir.Shape((f"{linear.name}.{expert}.rows", size))) for expert in range(experts)]
    parts = graph.insert(linear.node, "Split", (linear.rows, linear.sizes), like, {"axis": 0})
    _multiply_each(graph, linear.node, parts, linear.name, linear.weight, linear.bias)


def _expand_stack(graph: DecoderGraph, node: ir.Node) -> None:
    """Expand x [E, T, K] @ weight [E, K, N]."""
    x, right = node.inputs[0], node.inputs[1]
    stack = stack_of_matrices(graph, right)
    shape = None if x is None else dims(x)
    if x is None or stack is None or shape is None or len(shape) != 3 or shape[0] != stack.weight.shape[0]:
        return
    like = [(x.dtype, [1, *shape[1:]])] * stack.weight.shape[0]
    parts = graph.insert(node, "Split", (x,), like, {"axis": 0, "num_outputs": len(like)})
    _multiply_each(graph, node, parts, stack.name, permuted(stack.weight, (0, 2, 1)), None)


def _multiply_each(
    graph: DecoderGraph, node: ir.Node, parts: Sequence[ir.Value], name: str, weight: Weight, bias: Weight | None
) -> None:
    """Replace a node by a Linear for each part, one below the other. `weight` is [E, N, K], `bias` [E, N]."""
    products = []
    for expert, part in enumerate(parts):
        matrix = graph.add_weight(f"{name}.{expert}", _of_expert(weight, expert))
        addend = None if bias is None else graph.add_weight(f"{name}.{expert}.bias", _of_expert(bias, expert))
        products.append(insert_linear(graph, node, part, matrix, addend, part))
    output = node.outputs[0]
    (joined,) = graph.insert(node, "Concat", products, [(output.dtype, output.shape)], {"axis": 0})
    replace(output, joined)


def _of_expert(weight: Weight, expert: int) -> Weight:
    """The part of one expert. It is read as a whole, because a checkpoint gives no less."""
    alone = selected(weight, 0, np.array([expert]))  # [1, N, K]
    importance = alone.importance
    return Weight(
        weight.shape[1:],
        weight.dtype,
        lambda start, stop: weight.read(expert, expert + 1)[0][start:stop],
        alone.packed,
        step=weight.shape[1],
        importance=importance if importance is None else importance.reshape(-1),
        rounding=alone.rounding,
    )


def _expand_combination(graph: DecoderGraph, mixture: Mixture) -> None:
    """Rows in the order of the tokens again, then weights [T, 1, k] @ rows [T, k, H]."""
    node, dtype = mixture.node, mixture.rows.dtype
    tokens, chosen, size = mixture.shape
    last, middle = (graph.add_constant(f"axis.{axis}", np.array([axis], np.int64)) for axis in (-1, 1))
    (places,) = graph.insert(node, "Unsqueeze", (mixture.order, last), [(ir.DataType.INT64, None)])
    # Every row is overwritten: `order` is a permutation.
    (back,) = graph.insert(node, "ScatterND", (mixture.rows, places, mixture.rows), [(dtype, mixture.rows.shape)])
    shape = graph.add_constant(f"shape.-1x{chosen}x{size}", np.array([-1, chosen, size], np.int64))
    (grouped,) = graph.insert(node, "Reshape", (back, shape), [(dtype, [tokens, chosen, size])])
    (row,) = graph.insert(node, "Unsqueeze", (mixture.weights, middle), [(dtype, [tokens, 1, chosen])])
    (total,) = graph.insert(node, "MatMul", (row, grouped), [(dtype, [tokens, 1, size])])
    (flat,) = graph.insert(node, "Squeeze", (total, middle), [(dtype, mixture.output.shape)])
    replace(mixture.output, flat)
