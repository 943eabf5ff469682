"""No quantization, in ONNX's own operators only: MatMul in the target's floating type."""

from __future__ import annotations

from dataclasses import replace

from fmedge_converters.graph import DecoderGraph
from fmedge_converters.graph import replace as replace_value
from fmedge_converters.passes.linear import Linear
from fmedge_converters.schemes.floating import FLOATING
from fmedge_converters.weight import transposed


def spell_linear(graph: DecoderGraph, linear: Linear, *, is_head: bool, block_size: int) -> None:
    """MatMul with the weight stored as [K, N]; a head that is tied to the embedding stays [N, K] behind a Transpose,
    which a builder folds into the product, so that both share one initializer."""
    del block_size
    shared = is_head and any(use.node.op_type == "Gather" for use in linear.weight.uses())
    weight = graph.weights[linear.name]
    like = [(linear.output.dtype, linear.output.shape)]
    if shared:
        turned = [(linear.weight.dtype, weight.shape[::-1])]
        (matrix,) = graph.insert(linear.node, "Transpose", (linear.weight,), turned, {"perm": [1, 0]})
    else:
        matrix = graph.add_weight(f"{linear.name}.KN", transposed(weight))
    (product,) = graph.insert(linear.node, "MatMul", (linear.x, matrix), like)
    if linear.bias is not None:
        (product,) = graph.insert(linear.node, "Add", (product, linear.bias), like)
    replace_value(linear.output, product)


PLAIN_FLOATING = replace(FLOATING, linear=spell_linear)
