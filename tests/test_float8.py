"""Floats of 8 bits for TensorRT: rounding, products, and a decoder and a pipeline that are exported so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from fmedge_converters import rtx
from fmedge_converters.export import export
from fmedge_converters.export_options import ExportOptions
from fmedge_converters.graph import DecoderGraph
from fmedge_converters.image_calibration import PROMPTS, read_prompts
from fmedge_converters.image_export import calibrate_pipeline
from fmedge_converters.image_facts import image_facts
from fmedge_converters.part_build import PartOptions, build_part
from fmedge_converters.part_evidence import DIFFERENCES, compare
from fmedge_converters.parts import find_kind
from fmedge_converters.parts.part import Asked
from fmedge_converters.passes.linear import insert_linear, linears
from fmedge_converters.pipeline_source import empty_part, loaded_part, open_pipeline
from fmedge_converters.preflight.check import CheckOptions, check
from fmedge_converters.profiles import PartSizes, part_profiles
from fmedge_converters.schemes.float8 import E4M3, by_channel, by_tensor
from fmedge_converters.schemes.plain_floating import PLAIN_FLOATING
from fmedge_converters.schemes.static_codes import FLOAT8, FLOAT8_BY_TENSOR, Codes, static_float8
from fmedge_converters.targets import TARGETS
from fmedge_converters.weight import weight_from_array
from fmedge_runtimes.errors import ExportError
from fmedge_runtimes.onnxruntime_session import OnnxRuntimeSession
from hypothesis import given, settings
from hypothesis import strategies as st
from models import add_tokenizer, make_model
from tiny_diffusers import save_pipeline


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-6, 1e-3, 1.0, 100.0]), st.booleans())
def test_a_rounded_weight_is_off_by_half_a_step_of_its_own(seed: int, spread: float, channels: bool) -> None:
    rows = (np.random.default_rng(seed).standard_normal((5, 64)) * spread).astype(np.float16)
    rows[1], rows[2, 3] = 0, 300 * spread
    codes, scales = (by_channel if channels else by_tensor)(weight_from_array(rows))
    steps = scales.array()
    assert codes.dtype == E4M3 and steps.shape == ((5,) if channels else ())
    assert (steps > 0).all() and np.array_equal(steps, steps.astype(np.float16).astype(np.float32))
    found = codes.array().astype(np.float32) * (steps[:, None] if channels else steps)
    assert np.isfinite(found).all() and not found[1].any()
    wanted = rows.astype(np.float32)
    # Numbers that are not normal any more are off by half a step of the smallest; fp16's scales may cut a little off.
    smallest = np.broadcast_to((steps[:, None] if channels else steps) * 2.0**-10, wanted.shape)
    cut = np.where(np.abs(wanted) > 448 * np.broadcast_to(smallest * 2**10, wanted.shape), 1.0, 1 / 16)
    assert (np.abs(found - wanted) <= np.maximum(np.abs(wanted) * cut, smallest) * 1.001).all()


def product(weight: np.ndarray, bias: np.ndarray, largest: float | None, codes: Codes, path: Path) -> Path:
    """A product in fp16 whose input is at most so large, if that is known."""
    x = ir.val("x", ir.DataType.FLOAT16, ["rows", weight.shape[1]])
    graph = DecoderGraph(ir.Model(ir.Graph([x], [], nodes=[], opset_imports={"": 21}, name="p"), ir_version=10), {})
    matrix, addend = graph.add_weight("w", weight_from_array(weight)), graph.add_weight("b", weight_from_array(bias))
    end = ir.node("Identity", [x])
    graph.graph.append(end)
    made = insert_linear(graph, end, x, matrix, addend, x)
    end.replace_input_with(0, made)
    end.outputs[0].name, end.outputs[0].type, end.outputs[0].shape = "y", made.type, made.shape
    graph.graph.outputs.append(end.outputs[0])
    if largest is not None:
        graph.input_ranges["w"] = largest
    static_float8(PLAIN_FLOATING, codes).linear(graph, linears(graph)[0], is_head=False, block_size=0)
    graph.remove_unused()
    path.write_bytes(ir.to_proto(graph.model).SerializeToString())
    onnx.checker.check_model(str(path), full_check=True)
    return path


@pytest.mark.parametrize("codes", [FLOAT8, FLOAT8_BY_TENSOR], ids=["by channel", "by tensor"])
def test_a_product_is_that_of_rounded_factors_and_needs_a_gpu_that_has_it(codes: Codes, tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    weight = random.standard_normal((24, 64)).astype(np.float16)
    bias, x = random.standard_normal(24).astype(np.float16), random.standard_normal((5, 64)).astype(np.float16)
    x[0, 0] = 100  # beyond what calibration saw, and beyond its headroom
    path = product(weight, bias, 2.0, codes, tmp_path / "product.onnx")
    found = OnnxRuntimeSession(path, "cpu", None).run({"x": x}, {})["y"].astype(np.float32)

    def rounded(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return (values / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale

    w = torch.from_numpy(weight).float()
    peaks = w.abs().amax(1, keepdim=True) if codes is FLOAT8 else w.abs().max()
    factors = (
        rounded(torch.from_numpy(x).float(), torch.tensor(2 / 224).half().float()),
        rounded(w, (peaks / 448).half().float()),
    )
    wanted = (factors[0] @ factors[1].T + torch.from_numpy(bias).float()).numpy()
    np.testing.assert_allclose(found, wanted, atol=2e-2, rtol=2e-3)
    assert np.abs(found - (x.astype(np.float32) @ weight.T.astype(np.float32) + bias)).max() > 1
    if rtx.is_available():
        profiles = [Rows()]
        for capability in ("SM89", "SM120"):
            assert rtx.build(path, profiles, capability).problems == ()
        (problem,) = rtx.build(path, profiles, "SM86").problems
        assert "HW-specific datatypes" in problem.message


class Rows:
    """A profile for any number of rows."""

    name = "rows"
    axes = {"rows": (1, 4, 8)}  # noqa: RUF012 - nothing changes it


def test_a_product_that_calibration_has_not_seen_stays_as_it_was(tmp_path: Path) -> None:
    path = product(np.ones((4, 16), np.float16), np.ones(4, np.float16), None, FLOAT8, tmp_path / "product.onnx")
    assert {node.op_type for node in onnx.load(path).graph.node} == {"MatMul", "Add", "Identity"}


def test_prompts_are_the_lines_of_files(tmp_path: Path) -> None:
    assert read_prompts(()) == PROMPTS
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\n  a dog \n")
    assert read_prompts((str(file),)) == ("a cat", "a dog")
    file.write_text("\n")
    with pytest.raises(ExportError, match="there is no prompt"):
        read_prompts((str(file),))
    with pytest.raises(ExportError, match="cannot read the prompts"):
        read_prompts((str(tmp_path / "nothing.txt"),))


@pytest.mark.medium
def test_a_decoder_in_fp8_is_proven_and_built(tmp_path: Path) -> None:
    """Norms of queries and keys, two of each layer, a tied head; every product of its layers is rounded."""
    source = add_tokenizer(make_model(tmp_path / "model", "gemma3_text"))
    options = ExportOptions(
        str(source), tmp_path / "out", target="thor", quantize="fp8", context=64, calibrate_tokens=512
    )
    bundle = export(options)
    assert (bundle.manifest.precision, bundle.manifest.device) == ("fp8", "thor")
    assert {item.name: item.passed for item in bundle.manifest.evidence} == {
        "calibration": True,
        "graph": True,
        "full": True,
    }
    graph = onnx.load(bundle.folder / "decoder.onnx", load_external_data=False).graph
    assert sum(node.op_type == "QuantizeLinear" for node in graph.node) == 8
    assert {value.type.tensor_type.elem_type for value in graph.input if "past" in value.name} == {
        onnx.TensorProto.FLOAT16
    }
    found = check(bundle.folder, CheckOptions())
    assert found.passed and found.level == ("built" if rtx.is_available() else "rules passed")
    other = check(bundle.folder, CheckOptions("orin-nano-8gb-jp7.2", up_to="rules"))
    assert {finding.rule for finding in other.graphs[0].findings} == {"hardware-types"}


@pytest.mark.medium
def test_parts_in_fp8_have_the_ranges_of_images(tmp_path: Path) -> None:
    source = open_pipeline(str(save_pipeline("flux", tmp_path / "model")))
    modules = {part.name: empty_part(part) for part in source.parts if part.is_module}
    calls = {}
    for part in source.parts:
        kind = find_kind(part.kind) if part.is_module else None
        if kind is not None:
            calls[part.name] = kind.graphs(modules[part.name], Asked(part.name, source.pipeline))
    facts = image_facts(source, modules)
    options = ExportOptions(str(source.folder), tmp_path / "out", target="rtx", quantize="fp8")
    (tmp_path / "out").mkdir()
    found = calibrate_pipeline(source, facts, calls, (), tmp_path / "out", ["a cat"], options, lambda *_: None)
    assert not list((tmp_path / "out").iterdir())
    assert found.evidence.figures["prompts"] == 1
    part = next(part for part in source.parts if part.name == "transformer")
    row, ranges = TARGETS["rtx"], found.ranges["transformer"]
    module = loaded_part(part, torch.float32, allow_pickle=False)
    products = {f"{name}.weight" for name, each in module.named_modules() if isinstance(each, torch.nn.Linear)}
    assert set(ranges) == products and min(ranges.values()) > 0
    chosen = PartOptions(row, row.dtype, (row.image_schemes["fp8"],), None, ranges=ranges)
    ((graph,),) = build_part(
        part, modules["transformer"], calls["transformer"], [tmp_path / "fp8"], chosen, lambda *_: None
    )
    rounded = list(onnx.load(graph.written.graph, load_external_data=False).graph.node)
    assert sum(node.op_type == "QuantizeLinear" for node in rounded) == graph.quantized > 8
    difference, allowed = compare(module, graph.call, graph.written.graph), DIFFERENCES["float16", "fp8"]
    assert allowed.mean / 50 < difference.mean < allowed.mean and difference.largest < allowed.largest
    if rtx.is_available():
        assert rtx.build(graph.written.graph, part_profiles(graph.call, PartSizes(facts, 2)), "SM89").problems == ()
