"""Attention in matrix products where TensorRT-RTX cannot build the node: see scan_order.py.

The same as masked_attention.py writes: the scaled queries of one key head are the rows of one product, softmax in fp32.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from fmedge_converters.graph import DecoderGraph, replace
from fmedge_converters.scan_order import comes_after, dynamic_scans

Shape = list[int | ir.SymbolicDim | None]


def decompose_early_attention(graph: DecoderGraph, _context: int) -> int:
    """Write every Attention that does not depend on all Scans in products; returns how many there were."""
    scans = dynamic_scans(graph.graph)
    early = [node for node in graph.graph if node.op_type == "Attention" and not comes_after(node, scans)]
    for node in early:
        _decompose(graph, node)
    graph.remove_unused()
    return len(early)


def _decompose(graph: DecoderGraph, node: ir.Node) -> None:
    query, key, value, mask = node.inputs[:4]  # [B, H, S, D], [B, K, C, D], [B, K, C, E], [B, 1, S, C]
    output = node.outputs[0]
    assert query is not None and key is not None and value is not None and mask is not None
    assert query.shape is not None and key.shape is not None and value.shape is not None and query.dtype is not None
    dtype, (batch, heads, length, size) = query.dtype, query.shape
    kv_heads, capacity, width = key.shape[1], key.shape[2], value.shape[3]

    def emit(op: str, inputs: list[ir.Value], shape: Shape, kind: ir.DataType = dtype, **attributes: int) -> ir.Value:
        (made,) = graph.insert(node, op, inputs, [(kind, ir.Shape(shape))], attributes)
        return made

    def number(value: float) -> ir.Value:
        return graph.add_constant(f"attention.{dtype.name}.{value!r}", np.array(value, dtype.numpy()))

    def reshaped(x: ir.Value, rows: int | ir.SymbolicDim, columns: int | ir.SymbolicDim) -> ir.Value:
        """[B, rows, -1, columns]."""
        sizes = graph.add_constant(f"attention.0.{rows}.-1.{columns}", np.array([0, rows, -1, columns], np.int64))
        return emit("Reshape", [x, sizes], [batch, rows, length if rows == heads else None, columns])

    assert isinstance(size, int)
    scale = node.attributes.get_float("scale", 1 / math.sqrt(size))
    lowest = float(np.finfo(dtype.numpy()).min)
    grouped = reshaped(emit("Mul", [query, number(scale)], [*query.shape]), kv_heads, size)
    (turned,) = graph.insert(
        node, "Transpose", [key], [(dtype, [batch, kv_heads, size, capacity])], {"perm": [0, 1, 3, 2]}
    )
    scores = reshaped(emit("MatMul", [grouped, turned], [batch, kv_heads, None, capacity]), heads, capacity)
    full: Shape = [batch, heads, length, capacity]
    seen = emit("Cast", [emit("Where", [mask, scores, number(lowest)], full)], full, ir.DataType.FLOAT, to=1)
    soft = emit("Softmax", [seen], full, ir.DataType.FLOAT, axis=-1)
    weights = reshaped(emit("Cast", [soft], full, to=dtype.value), kv_heads, capacity)
    replace(output, reshaped(emit("MatMul", [weights, value], [batch, kv_heads, None, width]), heads, width))
