"""No quantization: MatMul in the target's floating type."""

from __future__ import annotations

from fmedge_converters.graph import MICROSOFT, DecoderGraph, replace
from fmedge_converters.passes.linear import Linear
from fmedge_converters.passes.lookup import Lookup
from fmedge_converters.schemes.scheme import Scheme
from fmedge_converters.weight import transposed


def spell_linear(graph: DecoderGraph, linear: Linear, *, is_head: bool, block_size: int) -> None:
    """MatMul with the weight stored as [K, N], which the kernel packs fastest; a head that is tied to the embedding
    stays [N, K], so that both share one initializer."""
    del block_size
    like = [(linear.output.dtype, linear.output.shape)]
    shared = any(use.node.op_type == "Gather" for use in linear.weight.uses())
    if is_head and shared:
        (product,) = graph.insert(
            linear.node,
            "FusedMatMul",
            (linear.x, linear.weight),
            like,
            {"transB": 1, "alpha": 1.0},
            MICROSOFT,
        )
    else:
        matrix = graph.add_weight(f"{linear.name}.KN", transposed(graph.weights[linear.name]))
        (product,) = graph.insert(linear.node, "MatMul", (linear.x, matrix), like)
    if linear.bias is not None:
        (product,) = graph.insert(linear.node, "Add", (product, linear.bias), like)
    replace(linear.output, product)


def spell_embedding(graph: DecoderGraph, embedding: Lookup, *, tied: bool, block_size: int) -> None:
    """Gather as it was traced."""
    del graph, embedding, tied, block_size


FLOATING = Scheme("none", "weights in the target's floating type", 32, spell_linear, spell_embedding, block_size=0)
