"""Operations on bfloat16 run where there are no kernels for them, and round as PyTorch does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from fmedge_converters.graph import DecoderGraph
from fmedge_converters.passes import ORT_PASSES
from fmedge_converters.passes.bfloat16 import compute_bfloat16_in_float32

FLOAT, BFLOAT16 = ir.DataType.FLOAT, ir.DataType.BFLOAT16


def made() -> DecoderGraph:
    """relu(a in bfloat16 * b in bfloat16) + b in bfloat16, in fp32 at the end."""
    a, b = (ir.Value(name=name, shape=ir.Shape(["n", 8]), type=ir.TensorType(FLOAT)) for name in "ab")
    nodes: list[ir.Node] = []

    def add(op: str, *inputs: ir.Value, to: ir.DataType = BFLOAT16) -> ir.Value:
        output = ir.Value(shape=ir.Shape(["n", 8]), type=ir.TensorType(to))
        nodes.append(ir.node(op, inputs, {"to": to} if op == "Cast" else None, outputs=[output]))
        return output

    short, other = add("Cast", a), add("Cast", b)
    result = add("Cast", add("Add", add("Relu", add("Mul", short, other)), other), to=FLOAT)
    result.name = "result"
    graph = ir.Graph([a, b], [result], nodes=nodes, opset_imports={"": 21}, name="graph")
    return DecoderGraph(ir.Model(graph, ir_version=10), {})


def test_results_are_those_of_pytorch_to_the_bit(tmp_path: Path) -> None:
    graph = made()
    assert compute_bfloat16_in_float32(graph, 0) == 3
    for rewrite in ORT_PASSES:  # no later pass, and not ONNX Runtime, takes the rounding out again
        rewrite(graph, 64)
    ir.save(graph.model, tmp_path / "graph.onnx")
    random = torch.Generator().manual_seed(0)
    a, b = (torch.randn(300, 8, generator=random) * 100 for _ in "ab")
    session = onnxruntime.InferenceSession(tmp_path / "graph.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"a": a.numpy(), "b": b.numpy()})
    short, other = a.bfloat16(), b.bfloat16()
    assert np.array_equal(found, (torch.relu(short * other) + other).float().numpy())


def test_a_graph_without_bfloat16_is_left_alone() -> None:
    graph = made()
    for node in list(graph.graph):
        for output in node.outputs:
            output.type = ir.TensorType(FLOAT)
    before = len(graph.graph)
    assert compute_bfloat16_in_float32(graph, 0) == 0
    assert len(graph.graph) == before
