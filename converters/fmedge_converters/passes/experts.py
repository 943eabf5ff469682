"""The plain form of a mixture of experts: a Split of the sorted rows, a Linear for each expert, a Concat.

Every scheme spells it, whatever the activation between the products, and an expert without rows costs one empty
product. A scheme whose target has a kernel for a whole mixture replaces the mixture before (schemes/qmoe.py).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from fmedge_converters.graph import DecoderGraph, replace
from fmedge_converters.passes.linear import insert_linear
from fmedge_converters.passes.mixture import ExpertLinear, Mixture, expert_linears, mixtures
from fmedge_converters.weight import Weight, selected


def expand_experts(graph: DecoderGraph) -> None:
    """Write all mixtures in their plain form."""
    for linear in expert_linears(graph):
        _expand_linear(graph, linear)
    for mixture in mixtures(graph):
        _expand_combination(graph, mixture)
    graph.remove_unused()


def _expand_linear(graph: DecoderGraph, linear: ExpertLinear) -> None:
    experts, _, size = linear.weight.shape
    shapes = [ir.Shape((f"{linear.name}.{expert}.rows", size)) for expert in range(experts)]
    parts = graph.insert(
        linear.node, "Split", (linear.rows, linear.sizes), [(linear.rows.dtype, shape) for shape in shapes], {"axis": 0}
    )
    products = []
    for expert, part in enumerate(parts):
        matrix = graph.add_weight(f"{linear.name}.{expert}", _of_expert(linear.weight, expert))
        bias = None
        if linear.bias is not None:
            bias = graph.add_weight(f"{linear.name}.{expert}.bias", _of_expert(linear.bias, expert))
        products.append(insert_linear(graph, linear.node, part, matrix, bias, part))
    (joined,) = graph.insert(linear.node, "Concat", products, [(linear.output.dtype, linear.output.shape)], {"axis": 0})
    replace(linear.output, joined)


def _of_expert(weight: Weight, expert: int) -> Weight:
    """The part of one expert. It is read as a whole, because a checkpoint gives no less."""
    return Weight(
        weight.shape[1:],
        weight.dtype,
        lambda start, stop: weight.read(expert, expert + 1)[0][start:stop],
        selected(weight, 0, np.array([expert])).packed,
        whole=True,
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
