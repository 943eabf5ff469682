"""The parts of image pipelines written for TensorRT: their numbers on the CPU, and TensorRT-RTX's builder."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from fmedge_converters import rtx
from fmedge_converters.export import export
from fmedge_converters.export_options import ExportOptions
from fmedge_converters.part_build import PartOptions, build_part
from fmedge_converters.part_evidence import DIFFERENCES, compare
from fmedge_converters.parts import find_kind
from fmedge_converters.parts.part import Asked
from fmedge_converters.pipeline_source import empty_part, loaded_part, open_pipeline
from fmedge_converters.plain_operators import attention_node, attention_products
from fmedge_converters.profiles import PartSizes, part_profiles
from fmedge_converters.targets import TARGETS
from fmedge_runtimes.manifest import ImageFacts
from tiny_diffusers import save_pipeline

IMAGE = ImageFacts(pipeline="FluxPipeline", height=32, width=32, steps=1, guidance=1.0)


@pytest.mark.parametrize("causal", [False, True])
def test_products_are_what_torch_calls_attention(causal):
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 6)
    mask = None if causal else torch.rand(2, 1, 1, 5) > 0.3
    if mask is not None:
        mask[..., 0] = True
    found = attention_products(query, key, value, mask, 0.0, causal, scale=0.3, enable_gqa=True)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=0.3, enable_gqa=True
    )
    assert torch.allclose(found, wanted, atol=1e-6)
    # In fp32 there is no kernel for the node, so it is written as products, too.
    assert torch.allclose(attention_node(query, key, value, mask, 0.0, causal, scale=0.3), wanted, atol=1e-6)


@pytest.mark.medium
def test_parts_compute_what_their_modules_compute_and_build(tmp_path: Path):
    source = open_pipeline(str(save_pipeline("flux", tmp_path / "model")))
    parts = {part.name: part for part in source.parts}
    for name, target, scheme, operators in (
        ("transformer", "tensorrt", "none", {"Attention", "LayerNormalization", "Gelu"}),
        ("text_encoder", "tensorrt-compat", "int8", {"DequantizeLinear", "Softmax", "LayerNormalization"}),
    ):
        module, kind, row = empty_part(parts[name]), find_kind(parts[name].kind), TARGETS[target]
        assert kind is not None
        options = PartOptions(row, row.dtype, (row.image_schemes[scheme],), None)
        calls = kind.graphs(module, Asked(name, source.pipeline))
        ((graph,),) = build_part(parts[name], module, calls, [tmp_path / target], options, lambda *_: None)
        found = compare(loaded_part(parts[name], torch.float32, allow_pickle=False), graph.call, graph.written.graph)
        allowed = DIFFERENCES["float16", scheme]
        assert found.largest < allowed.largest and found.mean < allowed.mean, (name, found)
        nodes = onnx.load(graph.written.graph, load_external_data=False).graph.node
        assert operators <= {node.op_type for node in nodes}
        assert all(node.domain == "" for node in nodes)
        if target == "tensorrt-compat":
            assert not {"Attention", "Gelu"} & {node.op_type for node in nodes}
        if rtx.is_available():
            built = rtx.build(graph.written.graph, part_profiles(graph.call, PartSizes(IMAGE, 2)))
            assert built.problems == () and built.engine is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "quantize"), [("sd", "none"), ("sdxl", "none"), ("sd3", "none"), ("flux", "none"), ("sd", "fp8")]
)
@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-compat"])
def test_pipelines_make_the_images_of_diffusers_and_build(name, quantize, target, tmp_path: Path):
    folder = save_pipeline(name, tmp_path / "model")
    bundle = export(ExportOptions(str(folder), tmp_path / "bundle", target=target, quantize=quantize))
    calibration = {"calibration"} if quantize == "fp8" else set()
    assert {item.name for item in bundle.manifest.evidence} == {"parts", "image"} | calibration
    assert all(item.passed for item in bundle.manifest.evidence)
    if rtx.is_available():
        for facts in bundle.manifest.graphs.values():
            built = rtx.build(bundle.file(facts.file), facts.profiles, "SM89")
            assert built.problems == () and built.engine is not None
