"""Mixtures of experts in a traced graph, read from the nodes that experts.py records."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from fmedge_converters.experts import COMBINE_EXPERTS, DOMAIN, EXPERT_LINEAR
from fmedge_converters.graph import DecoderGraph, constant, dims, produced_by
from fmedge_converters.weight import Weight, permuted, weight_from_array


@dataclass(frozen=True, slots=True)
class ExpertLinear:
    """An ExpertLinear node, read."""

    node: ir.Node
    rows: ir.Value  # [R, K]
    sizes: ir.Value  # [E]
    name: str
    """The name of its weight, by which what is made from it is named."""
    weight: Weight  # [E, N, K]
    bias: Weight | None  # [E, N]
    output: ir.Value  # [R, N]


@dataclass(frozen=True, slots=True)
class Mixture:
    """A CombineExperts node, read."""

    node: ir.Node
    rows: ir.Value  # [R, H]
    order: ir.Value  # [R]
    index: ir.Value  # [T, k]
    weights: ir.Value  # [T, k]
    x: ir.Value  # [T, H]
    output: ir.Value  # [T, H]
    shape: tuple[int | str, int, int]
    """T, k, H."""


def expert_linears(graph: DecoderGraph) -> list[ExpertLinear]:
    """All ExpertLinear nodes, in the order of the graph."""
    nodes = [node for node in graph.graph if (node.domain, node.op_type) == (DOMAIN, EXPERT_LINEAR)]
    return [_read_linear(graph, node) for node in nodes]


def expert_linear(graph: DecoderGraph, output: ir.Value) -> ExpertLinear | None:
    """The ExpertLinear node that computes a value, None if that is another node."""
    node = produced_by(output, EXPERT_LINEAR, DOMAIN)
    return None if node is None else _read_linear(graph, node)


def mixtures(graph: DecoderGraph) -> list[Mixture]:
    """All CombineExperts nodes, in the order of the graph."""
    nodes = [node for node in graph.graph if (node.domain, node.op_type) == (DOMAIN, COMBINE_EXPERTS)]
    return [_read_mixture(node) for node in nodes]


def _read_mixture(node: ir.Node) -> Mixture:
    rows, order, index, weights, x = _given(node.inputs)
    chosen, output = dims(index), dims(node.outputs[0])
    if chosen is None or output is None:
        raise RuntimeError(f"the shapes of {node.name} are not known")
    shape = (output[0], int(chosen[1]), int(output[1]))
    return Mixture(node, rows, order, index, weights, x, node.outputs[0], shape)


def _given(inputs: Iterable[ir.Value | None]) -> list[ir.Value]:
    return [value for value in inputs if value is not None]


def _read_linear(graph: DecoderGraph, node: ir.Node) -> ExpertLinear:
    rows, sizes, matrix, *bias = _given(node.inputs)
    stack = stack_of_matrices(graph, matrix)
    if stack is None:
        raise RuntimeError(f"the experts' weight {matrix.name} is no parameter")
    bound = _bias(graph, bias[0]) if bias else None
    return ExpertLinear(node, rows, sizes, stack.name, stack.weight, bound, node.outputs[0])


@dataclass(frozen=True, slots=True)
class Stack:
    """A parameter of rank 3."""

    name: str
    weight: Weight


def stack_of_matrices(graph: DecoderGraph, value: ir.Value | None) -> Stack | None:
    """The parameter of rank 3 behind a value, itself or transposed; None if it is something else."""
    swap = produced_by(value, "Transpose")
    stored = value if swap is None else swap.inputs[0]
    weight = graph.weight(stored)
    axes = [0, 1, 2] if swap is None else list(swap.attributes.get_ints("perm", []))
    if stored is None or weight is None or len(weight.shape) != 3 or axes[0] != 0:
        return None
    return Stack(str(stored.name), weight if swap is None else permuted(weight, axes))


def _bias(graph: DecoderGraph, value: ir.Value) -> Weight:
    weight, folded = graph.weight(value), constant(value)
    if weight is None and folded is not None:
        return weight_from_array(folded)
    if weight is None:
        raise RuntimeError(f"the experts' bias {value.name} is neither a parameter nor a constant")
    return weight


def router_nodes(graph: DecoderGraph) -> set[ir.Node]:
    """What computes the choice of experts and their weights from what a layer computes anyway; in models that choose
    without our experts function, the product whose largest results are taken."""
    found: set[ir.Node] = set()
    for mixture in mixtures(graph):
        trunk = _behind([mixture.x], set())
        found |= _behind([mixture.index, mixture.weights], trunk)
    for node in graph.graph:
        if node.op_type == "TopK":
            found |= _products_behind(node)
    return found


def _products_behind(node: ir.Node) -> set[ir.Node]:
    """The products that a node depends on without another in between."""
    found: set[ir.Node] = set()
    seen, waiting = {node}, [node]
    while waiting:
        for value in waiting.pop().inputs:
            producer = None if value is None else value.producer()
            if producer is None or producer in seen:
                continue
            seen.add(producer)
            if producer.op_type in ("MatMul", "Gemm"):
                found.add(producer)
            else:
                waiting.append(producer)
    return found


def _behind(values: Iterable[ir.Value], stop: set[ir.Node]) -> set[ir.Node]:
    """The nodes that values depend on, short of those in `stop`."""
    found: set[ir.Node] = set()
    waiting = [value.producer() for value in values]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found and node not in stop:
            found.add(node)
            waiting += [value.producer() for value in node.inputs if value is not None]
    return found
