"""What is rounded for TensorRT with more knowledge than a matrix's own: calibration text, a budget of bits, codes that
a source has already."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from calibrated_graphs import build, error, logits, plant_outliers, random_model
from fmedge_converters import rtx
from fmedge_converters.calibration import scale_sites
from fmedge_converters.export import export
from fmedge_converters.export_options import ExportOptions
from fmedge_converters.profiles import decoder_profiles
from fmedge_converters.schemes.dequantize_linear import kept_codes
from fmedge_converters.schemes.plain_floating import PLAIN_FLOATING
from fmedge_converters.schemes.scheme import WeightOptions
from fmedge_converters.targets import TARGETS, find_scheme, with_options
from fmedge_converters.weight import PackedMatrix, Weight
from fmedge_runtimes.bundle import Bundle
from fmedge_runtimes.errors import ExportError
from models import add_tokenizer, make_model
from test_calibrated_graphs import scaling
from test_quantized_checkpoints import SIZES, quantized

pytestmark = pytest.mark.usefixtures("traced_once")

RTX = TARGETS["rtx"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outliers")
    return plant_outliers(random_model(folder / "random", attention_bias=True), folder / "model")


@pytest.mark.parametrize(
    "name",
    [pytest.param("tensorrt", marks=pytest.mark.medium), pytest.param("tensorrt-compat", marks=pytest.mark.slow)],
)
def test_scaling_by_powers_of_two_changes_nothing(name: str, model: Path, tmp_path: Path) -> None:
    """Norms that are written out, and values that are written into a cache, are places for scales."""
    target = replace(TARGETS[name], dtype=torch.float32)
    wanted = logits(build(model, tmp_path / "plain", PLAIN_FLOATING, target=target))
    sites: list[int] = []
    scheme = replace(PLAIN_FLOATING, calibrate=scaling(sites).calibrate, needs_calibration=True)
    found = logits(build(model, tmp_path / "scaled", scheme, target=target))
    assert sites == [8]  # of each layer: q with k and v, o, gate with up, down
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.medium
def test_weights_that_were_fitted_lose_less_and_are_built(model: Path, tmp_path: Path) -> None:
    target = replace(RTX, dtype=torch.float32)
    wanted = logits(build(model, tmp_path / "wanted", PLAIN_FLOATING, target=target))
    found = {}
    for name in ("int4", "int4-awq", "int4-gptq", "int8", "w8a8"):
        scheme = RTX.schemes[name]
        built = build(model, tmp_path / name, scheme, 32 if scheme.block_size else None, RTX)
        found[name] = error(built, wanted)
        if built.calibration is not None:
            assert built.calibration.figures.get("scaled_inputs", built.calibration.figures.get("smoothed_inputs")) in (
                8,
                None,
            )
        if name == "int4-gptq":
            graph = onnx.load(built.written.graph, load_external_data=False).graph
            codes = [item for item in graph.initializer if item.data_type == onnx.TensorProto.INT4]
            assert len(codes) == 8
            assert rtx.is_available() is False or rtx.build(built.written.graph, decoder_profiles(2, 64)).problems == ()
    assert found["int4-awq"] < 0.5 * found["int4"]
    assert found["int4-gptq"] < 0.5 * found["int4"]
    assert found["w8a8"] < 0.3 * found["int8"]


@pytest.mark.medium
def test_smoothing_without_the_norms_would_be_no_smoothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build(model, tmp_path / "w8a8", RTX.schemes["w8a8"], target=RTX)
    assert built.calibration is not None
    figures = built.calibration.figures
    assert figures["smoothed_inputs"] == figures["products"] == 8
    assert float(figures["smoothed_largest_over_median"]) < 0.2 * float(figures["largest_over_median"])
    monkeypatch.setattr(scale_sites, "_behind_vector", lambda *_: None)
    blind = build(model, tmp_path / "blind", RTX.schemes["w8a8"], target=RTX)
    assert blind.calibration is not None and blind.calibration.figures["smoothed_inputs"] == 4


def test_zero_points_are_refused_with_the_reason() -> None:
    with pytest.raises(ExportError, match="--asymmetric gives each block a zero point, and TensorRT has none"):
        with_options(RTX, find_scheme(RTX, "int4"), WeightOptions(symmetric=False))
    head = with_options(RTX, find_scheme(RTX, "int4"), WeightOptions(head_bits=4))
    assert head.summary == "4-bit weights in symmetric blocks, 4-bit head"


def written(bundle: Bundle) -> list[np.ndarray]:
    """What the products of a bundle compute with, each [N, K], in the order of the features of its input."""
    graph = onnx.load(bundle.file("decoder.onnx")).graph
    arrays = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
    made = {node.output[0]: node for node in graph.node}
    found = []
    for node in graph.node:
        source = made.get(node.input[1]) if node.op_type == "MatMul" else None
        if source is None or source.op_type != "DequantizeLinear":
            continue
        codes, scales = (arrays[name] for name in source.input[:2])
        wide = scales.repeat(codes.shape[0] // len(scales), 0) if scales.ndim == 2 else scales[None]
        weights = (codes.astype(np.float32) * wide.astype(np.float32)).T
        before = made.get(node.input[0])
        sorted_by = arrays.get(before.input[1]) if before is not None and before.op_type == "Gather" else None
        found.append(weights if sorted_by is None else weights[:, np.argsort(sorted_by)])
    return found


@pytest.fixture(scope="module")
def floating(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_tokenizer(make_model(tmp_path_factory.mktemp("floating") / "model", "qwen2", **SIZES))


@pytest.mark.medium
@pytest.mark.parametrize(
    ("quantize", "options", "kept"),
    [
        ("int4", {"method": "gptq", "act_order": True}, 8),
        ("int4", {"method": "gptq", "bits": 8, "group_size": -1, "rules": {"mlp": {"bits": 4, "group_size": 64}}}, 8),
        ("int8", {"method": "gptq", "bits": 8, "group_size": -1}, 8),
        ("int8", {"method": "gptq", "bits": 8}, 0),  # scales that are not of whole rows
        ("int4", {"method": "awq", "symmetric": False}, 0),
    ],
    ids=["4 bits, act-order", "8 bits, 4 in the MLP", "8 bits of rows", "8 bits in groups", "zero points"],
)
def test_symmetric_codes_of_a_source_are_kept(
    quantize: str, options: dict[str, Any], kept: int, floating: Path, tmp_path: Path
) -> None:
    source, _, weights = quantized(floating, tmp_path, **options)
    bundle = export(ExportOptions(str(source), tmp_path / "bundle", target="rtx", quantize=quantize, verify="none"))
    (evidence,) = bundle.manifest.evidence
    assert (evidence.name, evidence.figures["kept"]) == ("weights", kept)
    matrices = written(bundle)
    rows = {row.tobytes() for matrix in matrices for row in matrix}
    exact = [all(row.tobytes() in rows for row in wanted) for wanted in weights.values()]
    assert all(exact) if kept else not any(exact)
    if options.get("act_order") and rtx.is_available():
        assert rtx.parse(bundle.file("decoder.onnx")) == ()


def test_codes_behind_scales_that_are_not_positive_are_rounded_again() -> None:
    """GGUF's Q4_0 has the sign of the largest weight in its scales."""
    scales = np.full((4, 2), 0.5, np.float16)
    matrix = PackedMatrix(4, 32, lambda a, b: np.zeros((b - a, 2, 16), np.uint8), lambda a, b: scales[a:b])
    weight = Weight((4, 64), np.dtype(np.float16), lambda a, b: np.zeros((b - a, 64), np.float16), matrix)
    assert kept_codes(weight, (4,)) is matrix
    assert kept_codes(weight, (8,)) is None
    assert kept_codes(replace(weight, shape=(3, 64)), (4,)) is None  # bytes of two codes would run over a row
    assert kept_codes(replace(weight, shape=(4, 48)), (4,)) is None
    scales[2, 1] = -0.5
    assert kept_codes(weight, (4,)) is None


@pytest.mark.medium
def test_a_budget_of_bits_is_kept(floating: Path, tmp_path: Path) -> None:
    """Hidden 128, so that blocks of 256 are for the second product of the MLP alone."""
    options = ExportOptions(str(floating), tmp_path / "bundle", target="rtx", quantize="int4", bits=8.5, verify="none")
    bundle = export(options)
    manifest = bundle.manifest
    graph = onnx.load(bundle.file("decoder.onnx"), load_external_data=False).graph
    sizes = {onnx.TensorProto.INT4: 4, onnx.TensorProto.INT8: 8, onnx.TensorProto.FLOAT16: 16}
    rounded = [name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.input[:2]]
    embedding = [node.input[0] for node in graph.node if node.op_type == "Gather" and node.input[1] == "input_ids"]
    stored = {item.name: item for item in graph.initializer}
    bits = sum(int(np.prod(stored[name].dims)) * sizes[stored[name].data_type] for name in {*rounded, *embedding})
    codes = sum(int(np.prod(stored[name].dims)) for name in rounded if name.endswith("codes"))
    numbers = codes + int(np.prod(stored[embedding[0]].dims))
    assert manifest.bits_per_weight == pytest.approx(bits / numbers)
    assert bits <= 8.5 * numbers
    assert manifest.matrices is not None and len(manifest.matrices) == 2 * 4 + 1
    found = {(facts.bits, facts.block_size) for facts in manifest.matrices.values()}
    assert len(found) > 1 and {block is None for bits, block in found if bits == 8} <= {True}
    with pytest.raises(ExportError, match=r"--bits 2 is too little"):
        export(replace(options, output=tmp_path / "less", bits=2))
