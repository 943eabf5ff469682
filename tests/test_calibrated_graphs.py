"""Weights that are fitted to calibration text, in graphs that run."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from calibrated_graphs import (
    CONTEXT,
    HELD_OUT,
    ROWS,
    build,
    calibration,
    error,
    int4,
    logits,
    plant_outliers,
    random_model,
)
from fmedge_converters.calibration import fit_codes, smooth_quant
from fmedge_converters.calibration.calibration import Calibration, Report
from fmedge_converters.calibration.fit_codes import fit_awq, fit_gptq
from fmedge_converters.calibration.linear_inputs import Inputs, Place
from fmedge_converters.calibration.scale_sites import scale_sites, scaled_columns
from fmedge_converters.calibration.weighted import weigh_errors
from fmedge_converters.graph import DecoderGraph
from fmedge_converters.reference import load_model
from fmedge_converters.rounding import Rounding
from fmedge_converters.schemes.dynamic_int8 import DYNAMIC_INT8
from fmedge_converters.schemes.floating import FLOATING
from fmedge_converters.schemes.scheme import Scheme
from fmedge_converters.schemes.static_codes import FLOAT8, FLOAT8_BY_TENSOR, Codes, static_float8, static_int8
from fmedge_converters.targets import TARGETS
from fmedge_converters.weight import Weight
from fmedge_runtimes.manifest import Evidence
from models import make_model

SCHEMES = TARGETS["cpu"].schemes
ROUNDED = ("DynamicQuantizeMatMul", "MatMulNBits", "QuantizeLinear")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("calibrated") / "model", attention_bias=True)


@pytest.fixture(scope="module")
def wanted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    return logits(build(model, tmp_path_factory.mktemp("calibrated") / "fp32", FLOATING))


def scaling(sites: list[int]) -> Scheme:
    """Scale the input of every site by random factors, round nothing."""

    def scale(
        graph: DecoderGraph, given: Calibration, rounding: Callable[[Weight], Rounding] | None, report: Report
    ) -> Evidence:
        del rounding, report
        random = np.random.default_rng(0)
        found = scale_sites(graph)
        sites.append(len(found))
        for site in found:
            name = site.consumers[0].name
            size = graph.weights[name].shape[1]
            factors = np.exp2(random.integers(-4, 5, size)).astype(np.float32)
            if site.groups is not None:
                factors = factors[site.groups]
            for linear in site.consumers:
                graph.weights[linear.name] = scaled_columns(graph.weights[linear.name], factors)
            site.divide(factors)
        return given.evidence("scaled", {})

    return replace(FLOATING, calibrate=scale, needs_calibration=True)


def test_scaling_by_powers_of_two_changes_nothing(
    model: Path, wanted: np.ndarray, tmp_path: Path, traced_once: None
) -> None:
    sites: list[int] = []
    found = logits(build(model, tmp_path / "scaled", scaling(sites)))
    assert sites == [8]  # of each layer: q with k and v, o, gate with up, down
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.medium
@pytest.mark.parametrize(
    ("model_type", "changes", "count"),
    [
        ("gemma3_text", {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}, 8),
        ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}, 6),  # no gate in front of down
    ],
)
def test_scaling_in_other_architectures(model_type: str, changes: dict[str, Any], count: int, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", model_type, **changes)
    before = logits(build(folder, tmp_path / "fp32", FLOATING))
    sites: list[int] = []
    found = logits(build(folder, tmp_path / "scaled", scaling(sites)))
    assert sites == [count]
    # Most kernels are exact under powers of two; some add the epsilon of a norm, or a row's factors, in another order.
    np.testing.assert_allclose(found, before, atol=2e-5, rtol=2e-5)


def test_fitted_codes_lose_less_than_half(model: Path, wanted: np.ndarray, tmp_path: Path, traced_once: None) -> None:
    fits = {"plain": None, "weighted": weigh_errors, "awq": fit_awq, "gptq": fit_gptq}
    found = {
        name: error(build(model, tmp_path / name, int4(fit, search=fit is not None), 32), wanted)
        for name, fit in fits.items()
    }
    assert found["weighted"] < 0.95 * found["plain"]
    assert found["awq"] < 0.9 * found["plain"]
    assert found["gptq"] < 0.3 * found["plain"]


def test_smoothed_activations_lose_less(model: Path, wanted: np.ndarray, tmp_path: Path, traced_once: None) -> None:
    """On the CPU, and in the form with fixed scales that is for GPUs."""
    large = plant_outliers(model, tmp_path / "large")
    int8 = error(build(large, tmp_path / "int8", DYNAMIC_INT8), wanted)
    assert error(build(large, tmp_path / "w8a8", SCHEMES["w8a8"]), wanted) < 0.3 * int8
    built = build(large, tmp_path / "static", static_int8(FLOATING))
    assert error(built, wanted) < 0.3 * int8
    graph = onnx.load(built.written.graph, load_external_data=False).graph
    products = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert len(products) == 8
    zeros = {node.input[2] for node in products}
    values = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer if item.name in zeros}
    assert [value.item() for value in values.values()] == [0]


def test_what_one_scale_cannot_carry_keeps_its_activations(
    model: Path, tmp_path: Path, traced_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def products(name: str, scheme: Scheme) -> list[str]:
        built = build(model, tmp_path / name, scheme)
        graph = onnx.load(built.written.graph, load_external_data=False).graph
        return [node.op_type for node in graph.node if node.op_type in ROUNDED]

    usual = products("usual", SCHEMES["w8a8"])
    assert (usual.count("DynamicQuantizeMatMul"), usual.count("MatMulNBits")) == (8, 1)  # the head
    monkeypatch.setattr(smooth_quant, "MOST_NOISE", 0.0)
    assert products("none", SCHEMES["w8a8"]) == ["MatMulNBits"] * 9
    assert products("fixed", static_int8(FLOATING)) == []


@pytest.mark.parametrize("codes", [FLOAT8, FLOAT8_BY_TENSOR], ids=["by channel", "by tensor"])
def test_floats_of_8_bits_are_what_torch_makes_of_them(
    codes: Codes, model: Path, wanted: np.ndarray, tmp_path: Path, traced_once: None
) -> None:
    """The whole decoder, against PyTorch with the same rounding of weights and activations in front of its products."""
    built = build(model, tmp_path / "fp8", static_float8(FLOATING, codes))
    module = load_model(model)
    seen: dict[str, float] = {}
    products = [(name, part) for name, part in module.named_modules() if isinstance(part, torch.nn.Linear)][:-1]
    assert len(products) == 14

    def note(name: str) -> Any:
        return lambda _, args: seen.__setitem__(name, max(seen.get(name, 0.0), float(args[0].abs().max())))

    handles = [part.register_forward_pre_hook(note(name)) for name, part in products]
    with torch.no_grad():
        for row in ROWS:
            module(input_ids=torch.tensor([row]), use_cache=False)
        for handle in handles:
            handle.remove()
        for name, part in products:
            scale = seen[name] / 224
            part.register_forward_pre_hook(lambda _, args, scale=scale: (float8(args[0], scale),))
        # Matrices that are one in the graph share a scale, if they have one for all.
        groups = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
        by_name = dict(products)
        for group in groups:
            for prefix in {name.rpartition(".")[0] for name in by_name if name.endswith(group)}:
                parts = [by_name[f"{prefix}.{name}"] for name in group]
                peak = max(float(part.weight.abs().max()) for part in parts)
                for part in parts:
                    peaks = part.weight.abs().amax(1, keepdim=True) if codes is FLOAT8 else torch.tensor(peak)
                    part.weight.copy_(float8(part.weight, (peaks / 448).half().float()))
        rounded = torch.cat([module(input_ids=torch.tensor([row]), use_cache=False).logits[0] for row in HELD_OUT])
    # The other way round a number here and there, between two codes, gets the other one.
    lost, other = error(built, wanted), error(built, rounded.numpy())
    assert 1e-5 < lost < 0.05
    assert other < 0.1 * lost
    graph = onnx.load(built.written.graph, load_external_data=False).graph
    kinds = [item.data_type for item in graph.initializer if item.name.endswith("fp8.codes")]
    assert kinds == [onnx.TensorProto.FLOAT8E4M3FN] * 8
    assert sum(node.op_type == "QuantizeLinear" for node in graph.node) == 8


def float8(values: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """Rounded to E4M3."""
    return (values / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def test_codes_are_written_as_they_were_fitted(model: Path, tmp_path: Path, traced_once: None) -> None:
    built = build(model, tmp_path / "gptq", SCHEMES["int4-gptq"], 32)
    graph = onnx.load(built.written.graph, load_external_data=False).graph
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert len(products) == 9  # with the head
    assert {attribute.i for node in products for attribute in node.attribute if attribute.name == "block_size"} == {32}
    assert built.quantization.kept == 0
    assert built.quantization.block_size == 32
    assert built.calibration is not None
    figures = built.calibration.figures
    assert figures["matrices"] == figures["of"] == 14
    assert figures["error"] < 0.5 * figures["plain_error"]
    assert not list((tmp_path / "gptq").glob("*.npy"))


def test_inputs_are_those_of_the_modules(model: Path, tmp_path: Path) -> None:
    """Against hooks on the modules, for a layer of a model in memory."""
    found = {
        place: one for one in calibration(model, tmp_path).model.statistics(lambda *_: None) for place in one.matrices
    }
    module = load_model(model)
    seen: dict[str, list[torch.Tensor]] = {}
    for name, part in module.named_modules():
        if isinstance(part, torch.nn.Linear) and "layers" in name:
            part.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0][0]))
    with torch.no_grad():
        for row in ROWS:
            module(input_ids=torch.tensor([row]), use_cache=False)
    assert {place.parameter for place in found} == {f"{name}.weight" for name in seen}
    for name, rows in seen.items():
        one = found[Place(f"{name}.weight")]
        x = torch.cat(rows)
        assert one.tokens == len(x) == len(ROWS) * CONTEXT
        torch.testing.assert_close(one.mean_square, x.square().mean(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(one.largest, x.abs().amax(0), rtol=1e-4, atol=1e-6)
    attention = "model.layers.0.self_attn"
    shared = {id(found[Place(f"{attention}.{name}_proj.weight")]) for name in "qkv"}
    assert len(shared) == 1


def test_one_layer_at_a_time_and_behind_rounded_ones(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No Gram matrix outlives its layer, and what the second layer sees went through the rounded first."""
    grams: list[weakref.ref[torch.Tensor]] = []
    most: list[int] = []
    add = Inputs.add

    def remember(self: Inputs, x: torch.Tensor, *, with_gram: bool) -> None:
        new = self.gram is None
        add(self, x, with_gram=with_gram)
        if new and self.gram is not None:
            grams.append(weakref.ref(self.gram))
            most.append(sum(gram() is not None for gram in grams))

    monkeypatch.setattr(Inputs, "add", remember)
    means: dict[bool, list[np.ndarray]] = {True: [], False: []}
    for changed, seen in means.items():

        def fit(records: list[Inputs], parameters: Any, changed: bool = changed, seen: list[Any] = seen) -> None:
            assert {name.split(".")[2] for name in parameters} == {str(len(seen))}
            seen.append(records[0].mean_square.numpy())
            for record in records:
                for matrix in record.matrices.values():
                    assert matrix is not None
                    if changed:
                        matrix.mul_(0.5)

        calibration(model, tmp_path).model.fit(fit, lambda *_: None)
    assert most == [1, 2, 3, 4] * 4  # of each of two layers, in each of two runs
    np.testing.assert_array_equal(means[True][0], means[False][0])
    assert not np.allclose(means[True][1], means[False][1])


@pytest.mark.medium
@pytest.mark.parametrize("rare", [False, True], ids=["tokens for all", "rare experts"])
def test_experts_are_fitted_to_the_tokens_that_reach_them(
    rare: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, traced_once: None
) -> None:
    if rare:
        monkeypatch.setattr(fit_codes, "EXPERT_TOKENS", 1 << 30)
    folder = random_model(
        tmp_path / "model", "mixtral", num_local_experts=4, num_experts_per_tok=2, intermediate_size=64
    )
    exact = logits(build(folder, tmp_path / "fp32", FLOATING))
    plain = error(build(folder, tmp_path / "int4", int4(None, search=False), 32), exact)
    built = build(folder, tmp_path / "gptq", int4(fit_gptq), 32)
    assert error(built, exact) < (0.5 if rare else 0.3) * plain
    graph = onnx.load(built.written.graph, load_external_data=False).graph
    assert sum(node.op_type == "QMoE" for node in graph.node) == 2
    assert built.calibration is not None
    figures = built.calibration.figures
    assert figures["matrices"] == figures["of"] == 2 * (4 + 4 + 4)
    assert figures["experts_fitted_together"] == (16 if rare else 0)
