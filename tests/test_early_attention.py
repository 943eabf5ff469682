"""Attention that TensorRT-RTX cannot build as a node."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from fmedge_converters.graph import DecoderGraph
from fmedge_converters.passes.early_attention import decompose_early_attention
from onnx import helper
from preflight_graphs import scan_beside_attention


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def test_products_beside_a_scan_compute_what_the_node_does() -> None:
    model = scan_beside_attention()
    graph = DecoderGraph(ir.serde.deserialize_model(model), {})
    assert decompose_early_attention(graph, 0) == 1
    written = ir.serde.serialize_model(graph.model)
    assert "Attention" not in operators(written)
    random = np.random.default_rng(0)
    feeds = {
        "q": random.normal(size=(1, 4, 4, 64)).astype(np.float16),
        "k": random.normal(size=(1, 2, 16, 64)).astype(np.float16),
        "v": random.normal(size=(1, 2, 16, 64)).astype(np.float16),
        "m": np.tril(np.ones((4, 16), bool), 12)[None, None],
        "first": np.zeros(8, np.float32),
        "tokens": np.ones((5, 8), np.float32),
    }
    wanted, found = (
        onnxruntime.InferenceSession(each.SerializeToString(), providers=["CPUExecutionProvider"]).run(["y"], feeds)[0]
        for each in (model, written)
    )
    assert np.abs(wanted).max() > 0.5
    assert np.abs(wanted - found).max() < 4e-3


def test_attention_behind_every_scan_stays() -> None:
    behind = scan_beside_attention()
    scan = next(node for node in behind.graph.node if node.op_type == "Scan")
    attention = next(node for node in behind.graph.node if node.op_type == "Attention")
    attention.input[0] = "asked"
    behind.graph.node.remove(attention)
    behind.graph.node.extend(
        [
            helper.make_node("ReduceSum", [scan.output[0]], ["total"], keepdims=0),
            helper.make_node("Cast", ["total"], ["half"], to=onnx.TensorProto.FLOAT16),
            helper.make_node("Add", ["q", "half"], ["asked"]),
            attention,
        ]
    )
    second = onnx.ModelProto()
    second.CopyFrom(behind)
    another = second.graph.node.add()
    another.CopyFrom(scan)
    another.output[:] = ["last again", "sums again"]
    graph = DecoderGraph(ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(second)), {})
    assert decompose_early_attention(graph, 0) == 1
    for model in (behind, scan_beside_attention(4)):
        graph = DecoderGraph(ir.serde.deserialize_model(model), {})
        assert decompose_early_attention(graph, 0) == 0
        assert "Attention" in operators(ir.serde.serialize_model(graph.model))
