"""Rules about QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from fmedge_converters.preflight.graph import Graph, constant_of, dtype_of, input_of, is_constant, shape_of
from fmedge_converters.preflight.rule import Evidence, Rule
from fmedge_converters.preflight.versions import Asked

BOTH = ("QuantizeLinear", "DequantizeLinear")
RAN: Evidence = "ran in TensorRT-RTX 1.7.1"
BLOCKS = (16, 32, 64, 128, 256)
"""Block sizes that were built; others may be."""
CODES = frozenset(
    {ir.DataType.INT8, ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT4E2M1}
    | {kind for kind in (getattr(ir.DataType, "FLOAT8E8M0", None),) if kind is not None}
)


def _codes(node: ir.Node) -> ir.Value | None:
    """The quantized side of a node."""
    return input_of(node, 0) if node.op_type == "DequantizeLinear" else node.outputs[0]


def _type(node: ir.Node, graph: Graph, asked: Asked) -> Iterator[str]:
    del graph, asked
    kind = dtype_of(_codes(node))
    if kind is not None and kind not in CODES and not _is_byte_activation(node):
        yield f"codes are INT8, INT4, FLOAT8E4M3FN or FLOAT4E2M1, and these are {kind.name}"


def _is_byte_activation(node: ir.Node) -> bool:
    """Whether a node makes or takes unsigned bytes that are computed."""
    return dtype_of(_codes(node)) is ir.DataType.UINT8 and not is_constant(_codes(node))


def _byte(node: ir.Node, graph: Graph, asked: Asked) -> Iterator[str]:
    del graph, asked
    if _is_byte_activation(node):
        yield "codes of UINT8 are not among the documented types: it may be refused, or taken for INT8"


def _zero(node: ir.Node, graph: Graph, asked: Asked) -> Iterator[str]:
    del graph, asked
    value = input_of(node, 2)
    if value is None:
        return
    if not is_constant(value):
        yield "its zero point is computed, and must be zero"
        return
    zeros = constant_of(value)
    if zeros is not None and np.any(zeros.astype(np.float32)):
        first = zeros.astype(np.float32)[zeros.astype(np.float32) != 0].reshape(-1)[0]
        yield f"its zero point is {first:g}, and must be 0"


def _scale(node: ir.Node, graph: Graph, asked: Asked) -> Iterator[str]:
    del graph, asked
    scales = constant_of(input_of(node, 1))
    if scales is not None and np.any(scales.astype(np.float32) <= 0):
        yield "a scale is not positive"


def _blocks(node: ir.Node, graph: Graph, asked: Asked) -> Iterator[str]:
    del graph, asked
    codes, scales = shape_of(_codes(node)), shape_of(input_of(node, 1))
    if codes is None or scales is None or len(scales) < 2 or len(codes) != len(scales):
        return
    pairs = [(size, count) for size, count in zip(codes, scales, strict=True) if size and count]
    blocked = [(size, count) for size, count in pairs if size != count]
    if len(blocked) > 1:
        yield "blocks lie along one axis only"
    elif blocked and blocked[0][0] % blocked[0][1]:
        yield f"{blocked[0][0]} values do not divide into {blocked[0][1]} blocks"
    elif blocked and blocked[0][0] // blocked[0][1] not in BLOCKS and blocked[0][1] > 1:
        yield f"blocks of {blocked[0][0] // blocked[0][1]} have not been tried; {', '.join(map(str, BLOCKS))} have been"


def _int4_weights(node: ir.Node, graph: Graph, asked: Asked) -> Iterator[str]:
    del graph, asked
    if dtype_of(_codes(node)) is ir.DataType.INT4 and not is_constant(input_of(node, 0)):
        yield "INT4 is for weights, which are constants"


def _used_elsewhere(node: ir.Node, graph: Graph, asked: Asked) -> Iterator[str]:
    del graph, asked
    if node.op_type in BOTH or node.op_type == "Constant":
        return
    for value in node.inputs:
        kind = dtype_of(value)
        if kind is not None and kind in CODES and is_constant(value):
            yield f"it gets codes of {kind.name}, which go into DequantizeLinear and nowhere else"


QUANTIZATION_RULES = (
    Rule("quantized-constant", (), _used_elsewhere, "Dequantize them first", RAN),
    Rule("quantized-type", BOTH, _type, "Quantize symmetrically to one of these", RAN),
    Rule("uint8-codes", BOTH, _byte, "Quantize symmetrically to INT8", "documentation", "wrong"),
    Rule("zero-point", BOTH, _zero, "Quantize symmetrically: export for tensorrt", RAN),
    Rule("scale", BOTH, _scale, "Quantize it again", "parser source"),
    Rule("blocks", BOTH, _blocks, "Export with --block-size 128", RAN, "note"),
    Rule("int4-weights", ("DequantizeLinear",), _int4_weights, "Quantize activations to int8", "documentation"),
)
