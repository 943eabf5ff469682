"""Whether a value of a graph can be negative."""

from __future__ import annotations

import onnx_ir as ir

from fmedge_converters.graph import DecoderGraph, constant

NEVER = {"Softmax", "Sigmoid", "Exp", "Relu", "Softplus", "Sqrt", "Abs", "ReduceL1", "ReduceL2", "ReduceSumSquare"}
"""Their results are not negative, whatever they get."""
LIKE_FIRST = {
    *("Cast", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Reshape", "Slice", "Split"),
    *("Squeeze", "TopK", "Transpose", "Unsqueeze", "ReduceMax", "ReduceMean", "ReduceSum"),
}
"""Their results are not negative if their first input is not."""
LIKE_ALL = {"Add", "Concat", "Div", "Max", "Mean", "Min", "Mul", "Pow", "Sum"}
LARGEST = 1 << 16
"""Elements of a parameter that is read to know."""


def never_negative(graph: DecoderGraph, value: ir.Value | None) -> bool:
    """Whether a value is shown to be zero or more by the operators that compute it."""
    if value is None:
        return False
    node = value.producer()
    if node is None:
        return _constant_is_not(graph, value)
    if node.domain:
        return False
    if node.op_type in NEVER:
        return True
    if node.op_type in LIKE_FIRST:
        return never_negative(graph, node.inputs[0])
    inputs = node.inputs[1:] if node.op_type == "Where" else node.inputs
    if node.op_type in LIKE_ALL or node.op_type == "Where":
        return all(never_negative(graph, item) for item in inputs)
    if node.op_type == "ScatterElements":
        return never_negative(graph, node.inputs[0]) and never_negative(graph, node.inputs[2])
    return False


def _constant_is_not(graph: DecoderGraph, value: ir.Value) -> bool:
    weight = graph.weight(value)
    if weight is not None:
        return weight.nbytes <= LARGEST * weight.dtype.itemsize and bool((weight.array() >= 0).all())
    array = constant(value, LARGEST)
    return array is not None and array.dtype.kind in "fiu" and bool((array >= 0).all())
