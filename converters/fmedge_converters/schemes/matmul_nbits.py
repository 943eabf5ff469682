"""ONNX Runtime's product with weights in blocks: MatMulNBits.

Operator: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from fmedge_converters.graph import MICROSOFT, DecoderGraph, replace
from fmedge_converters.passes.linear import Linear


@dataclass(frozen=True, slots=True)
class Blocks:
    """How the codes of a matrix lie in it."""

    shape: tuple[int, ...]
    """[N, K]."""
    bits: int
    block_size: int


def insert_matmul_nbits(
    graph: DecoderGraph,
    linear: Linear,
    given: tuple[ir.Value, ir.Value, ir.Value, ir.Value | None],
    blocks: Blocks,
    accuracy_level: int,
) -> None:
    """Put the operator in the place of a Linear. `given` are input, codes, scales, and zero points or None."""
    inputs: list[ir.Value | None] = list(given)
    if linear.bias is not None:
        inputs += [None, linear.bias]
    elif inputs[-1] is None:
        inputs.pop()
    (product,) = graph.insert(
        linear.node,
        "MatMulNBits",
        inputs,
        [(linear.output.dtype, linear.output.shape)],
        {
            "K": blocks.shape[1],
            "N": blocks.shape[0],
            "bits": blocks.bits,
            "block_size": blocks.block_size,
            "accuracy_level": accuracy_level,
        },
        MICROSOFT,
    )
    replace(linear.output, product)
