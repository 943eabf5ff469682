"""Every product with a weight matrix becomes one `fmedge::Linear` node, which a quantization scheme then spells.

    Linear(x [..., K], weight [N, K], bias [N]?) -> [..., N]        y = x @ weight.T + bias

The node exists between passes only; no written graph holds one. What chooses the experts of a mixture is marked
`exact`: it is neither quantized nor merged with others, because a rounding error there is a wrong expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from fmedge_converters.graph import DecoderGraph, constant, dims, produced_by, replace
from fmedge_converters.passes.mixture import router_nodes
from fmedge_converters.weight import Weight, transposed

DOMAIN = "fmedge"
LINEAR = "Linear"
EXACT = "exact"
HEAD = "head"
"""Marks a part of a head that is divided."""


@dataclass(frozen=True, slots=True)
class Linear:
    """A Linear node, read."""

    node: ir.Node
    x: ir.Value  # [..., K]
    weight: ir.Value  # [N, K]
    bias: ir.Value | None  # [N]
    output: ir.Value  # [..., N]
    exact: bool
    of_head: bool
    """A part of a head that is divided."""

    @property
    def name(self) -> str:
        """The name of its weight, by which what is made from it is named."""
        return str(self.weight.name)


def linears(graph: DecoderGraph) -> list[Linear]:
    """All Linear nodes, in the order of the graph."""
    found = []
    for node in graph.graph:
        if node.domain == DOMAIN and node.op_type == LINEAR:
            x, weight, *bias = node.inputs
            if x is not None and weight is not None:
                exact = bool(node.attributes.get_int(EXACT, 0))
                of_head = bool(node.attributes.get_int(HEAD, 0))
                found.append(Linear(node, x, weight, bias[0] if bias else None, node.outputs[0], exact, of_head))
    return found


def heads(graph: DecoderGraph) -> list[Linear]:
    """The head of a decoder, which is its last Linear, or all parts of a head that is divided."""
    found = linears(graph)
    return [linear for linear in found if linear.of_head] or found[-1:]


def insert_linear(
    graph: DecoderGraph,
    before: ir.Node,
    x: ir.Value,
    weight: ir.Value,
    bias: ir.Value | None,
    like: ir.Value,
    *,
    exact: bool = False,
    head: bool = False,
) -> ir.Value:
    """Insert a Linear whose output is like another value, but for its last dimension."""
    size = graph.weights[str(weight.name)].shape[0]
    shape = None if like.shape is None else [*list(like.shape)[:-1], size]
    inputs = (x, weight) if bias is None else (x, weight, bias)
    (output,) = graph.insert(
        before, LINEAR, inputs, [(like.dtype, shape)], {EXACT: int(exact), HEAD: int(head)}, DOMAIN
    )
    return output


def recognise_linears(graph: DecoderGraph, _context: int) -> int:
    """Rewrite MatMul and Gemm with a parameter, and the addition of a bias behind them."""
    changed = 0
    exact = router_nodes(graph)
    for node in list(graph.graph):
        if node.domain or node.op_type not in ("MatMul", "Gemm"):
            continue
        x, right = node.inputs[0], node.inputs[1]
        if x is None or right is None:
            continue
        matrix = _matrix(graph, node, right)
        if matrix is None:
            continue
        output = node.outputs[0]
        last, bias = (node, None) if node.op_type == "MatMul" else (node, _gemm_bias(node))
        if node.op_type == "MatMul":
            addition = _bias_addition(graph, output)
            if addition is not None:
                last, bias = addition
                output = last.outputs[0]
        replace(output, insert_linear(graph, last, x, matrix, bias, output, exact=node in exact))
        changed += 1
    graph.remove_unused()
    return changed


def _matrix(graph: DecoderGraph, node: ir.Node, right: ir.Value) -> ir.Value | None:
    """The parameter as [N, K], through a Transpose or Gemm's transB; None if the operand is no parameter."""
    transpose = produced_by(right, "Transpose")
    if transpose is not None:
        weight = graph.weight(transpose.inputs[0])
        perm = transpose.attributes.get_ints("perm", [1, 0])
        return transpose.inputs[0] if weight is not None and list(perm) == [1, 0] else None
    weight = graph.weight(right)
    if weight is None or len(weight.shape) != 2:
        return None
    if node.op_type == "Gemm":
        plain = (
            node.attributes.get_float("alpha", 1.0) == 1.0
            and node.attributes.get_float("beta", 1.0) == 1.0
            and node.attributes.get_int("transA", 0) == 0
        )
        if not plain or (len(node.inputs) > 2 and node.inputs[2] is not None and _gemm_bias(node) is None):
            return None
        if node.attributes.get_int("transB", 0):
            return right
    return _add_transposed(graph, right, weight)


def _add_transposed(graph: DecoderGraph, value: ir.Value, weight: Weight) -> ir.Value:
    return graph.add_weight(f"{value.name}.T", transposed(weight))


def _gemm_bias(node: ir.Node) -> ir.Value | None:
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return bias if bias is not None and len(dims(bias) or ()) == 1 and constant(bias, 1 << 22) is not None else None


def _bias_addition(graph: DecoderGraph, product: ir.Value) -> tuple[ir.Node, ir.Value] | None:
    """The only user of a product, if it adds a parameter of one dimension to it."""
    users = list(product.uses())
    if len(users) != 1 or product.is_graph_output() or users[0].node.op_type != "Add":
        return None
    addition = users[0].node
    for value in addition.inputs:
        weight = graph.weight(value)
        if value is not None and weight is not None and len(weight.shape) == 1:
            same = dims(product) is not None and (dims(product) or [""])[-1] == weight.shape[0]
            return (addition, value) if same else None
    return None
