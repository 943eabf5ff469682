"""Exports of checkpoints that are quantized already: the codes of the source are in the bundle, and nothing else."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import quantized_checkpoints as made
import torch
from fmedge_converters.checkpoint import Checkpoint, Files
from fmedge_converters.decoder import empty_model
from fmedge_converters.export import export
from fmedge_converters.export_options import ExportOptions
from fmedge_converters.source import open_source
from fmedge_runtimes.bundle import Bundle
from fmedge_runtimes.errors import ExportError, ParityError, SourceError
from fmedge_runtimes.load import load
from fmedge_runtimes.sampling import Sampling
from models import add_tokenizer, greedy, make_model
from safetensors.torch import load_file, save_file
from test_quantized_formats import restored

pytestmark = pytest.mark.usefixtures("traced_once")

SIZES = {"hidden_size": 128, "intermediate_size": 256, "eos_token_id": 0}
PROMPT = [3, 17, 200, 41, 8]


@pytest.fixture(scope="module")
def floating(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model to quantize, with biases where q, k and v have them."""
    return add_tokenizer(make_model(tmp_path_factory.mktemp("floating") / "model", "qwen2", **SIZES))


def quantized(
    floating: Path,
    folder: Path,
    method: str,
    *,
    bits: int = 4,
    group_size: int = 32,
    symmetric: bool = True,
    act_order: bool = False,
    rules: dict[str, dict[str, int]] | None = None,
) -> tuple[Path, Path, dict[str, np.ndarray]]:
    """A model folder as a quantizer writes it, the same dequantized, and the dequantized weights by name."""
    random = np.random.default_rng(0)
    orders = {size: random.permutation(size) for size in (64, 128, 256)}
    weights: dict[str, np.ndarray] = {}

    def spell(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        size, width = group_size, bits
        for pattern, changes in (rules or {}).items():
            if pattern in name:
                size, width = changes.get("group_size", size), changes.get("bits", width)
        columns = weight.shape[1]
        groups = (np.arange(columns) // (columns if size == -1 else size))[orders[columns]] if act_order else None
        matrix = made.rounded(weight, width, size, symmetric=symmetric, groups=groups)
        weights[f"{name}.weight"] = matrix.dequantized()
        if method == "awq":
            return made.awq_gemm(matrix)
        if method == "gptq":
            return made.gptq(matrix, width)
        tensors = made.pack_quantized(matrix, width, act_order)
        if not symmetric:
            tensors["weight_zero_point"] = made.words(matrix.zeros.T, width).T
        return tensors

    config: dict[str, Any] = {"quant_method": method, "bits": bits, "group_size": group_size}
    if method == "gptq":
        config |= {"desc_act": act_order, "sym": symmetric}
        config["dynamic"] = {f"+:.*{pattern}.*": changes for pattern, changes in (rules or {}).items()}
    if method == "compressed-tensors":
        arguments = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group"}
        arguments["group_size"] = group_size
        config["format"] = "pack-quantized"
        config["config_groups"] = {"group_0": {"targets": ["Linear"], "weights": arguments}}
    source = made.write_quantized(floating, folder / "quantized", config, spell)
    plain = made.write_quantized(floating, folder / "plain", {}, lambda *_: None)
    tensors = load_file(plain / "model.safetensors")
    tensors |= {name: torch.from_numpy(value) for name, value in weights.items()}
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    return source, plain, weights


def exported(source: Path, tmp_path: Path, **changes: Any) -> Bundle:
    return export(ExportOptions(str(source), tmp_path / "bundle", **{"verify": "none", "quantize": "int4", **changes}))


def node_counts(bundle: Bundle) -> Counter[str]:
    graph = onnx.load(bundle.file("decoder.onnx"), load_external_data=False).graph
    return Counter(node.op_type for node in graph.node)


def computed_with(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, bits: int) -> np.ndarray:
    """Weights [N, K] of codes, scales [N, blocks] and zero points as MatMulNBits and QMoE define them."""

    def singles(packed: np.ndarray) -> np.ndarray:
        return np.stack([(packed >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)], -1).astype(np.float64)

    rows, blocks = scales.shape
    centre = 1 << (bits - 1) if zeros is None else singles(zeros).reshape(rows, -1)[:, :blocks, None]
    return ((singles(codes).reshape(rows, blocks, -1) - centre) * scales.astype(np.float64)[..., None]).reshape(
        rows, -1
    )


def written_matrices(bundle: Bundle) -> list[np.ndarray]:
    """What the products of a bundle compute with, each [N, K], in the order of the features of its input."""
    graph = onnx.load(bundle.file("decoder.onnx")).graph
    arrays = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
    for node in graph.node:
        if node.op_type == "Cast" and node.input[0] in arrays:  # scales that lie in the file as bf16
            arrays[node.output[0]] = arrays[node.input[0]].astype(np.float32)
    sorted_by = {node.output[0]: arrays.get(node.input[1]) for node in graph.node if node.op_type == "Gather"}
    found = []
    for node in graph.node:
        attributes = {item.name: item.i for item in node.attribute}
        inputs = [arrays.get(name) for name in node.input]
        if node.op_type == "MatMulNBits":
            zeros = inputs[3] if len(inputs) > 3 else None
            weights = computed_with(inputs[1], inputs[2], zeros, attributes["bits"])[:, : attributes["K"]]
            columns = sorted_by.get(node.input[0])
            found.append(weights if columns is None else weights[:, np.argsort(columns)])
        if node.op_type == "QMoE":
            for codes, scales, zeros in (inputs[2:4] + inputs[11:12], inputs[5:7] + inputs[12:13]):
                each = [None] * len(codes) if zeros is None else zeros
                found += map(computed_with, codes, scales, each, [attributes["expert_weight_bits"]] * len(codes))
    return found


def check_kept(bundle: Bundle, weights: dict[str, np.ndarray]) -> None:
    """Every matrix of the source is in the bundle, alone or merged with others, to the bit."""
    rows = {row.tobytes() for matrix in written_matrices(bundle) for row in matrix.astype(np.float32)}
    for name, wanted in weights.items():
        assert all(row.tobytes() in rows for row in wanted), name


@pytest.mark.medium
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("awq", {"symmetric": False}),
        ("gptq", {}),
        ("gptq", {"symmetric": False, "act_order": True}),
        ("gptq", {"bits": 8, "group_size": -1}),
        ("compressed-tensors", {"group_size": 64}),
        ("compressed-tensors", {"symmetric": False, "act_order": True, "bits": 8}),
    ],
)
def test_the_codes_of_the_source_are_kept(method: str, options: dict[str, Any], floating: Path, tmp_path: Path) -> None:
    source, _, weights = quantized(floating, tmp_path, method, **options)
    bundle = exported(source, tmp_path)
    check_kept(bundle, weights)
    manifest = bundle.manifest
    (kept,) = manifest.evidence
    assert (kept.name, kept.figures["kept"], kept.figures["matrices"]) == ("weights", 8, 10)
    assert manifest.source.quantization is not None
    assert manifest.source.quantization.lower() == method
    assert manifest.block_size == {-1: 128, 64: 64}.get(options.get("group_size", 32), 32)
    counts = node_counts(bundle)
    # q, k and v in one product, gate and up in one, and one sorted input for each of the four products.
    assert counts["MatMulNBits"] == 2 * 4 + 1
    assert counts["Gather"] - 1 == (8 if options.get("act_order") else 0)


@pytest.mark.medium
def test_the_evidence_compares_with_the_dequantized_source(floating: Path, tmp_path: Path) -> None:
    source, _, _ = quantized(floating, tmp_path, "gptq", symmetric=False, act_order=True)
    bundle = exported(source, tmp_path, verify="full", quantize="none")
    kept, graph, full = bundle.manifest.evidence
    assert (kept.figures["kept"], graph.passed, full.passed) == (0, True, True)
    assert full.figures["greedy_equal"] == full.figures["greedy_tokens"]


@pytest.mark.medium
@pytest.mark.parametrize(("scheme", "target"), [("none", "cpu"), ("int8", "cpu"), ("none", "cuda")])
def test_other_quantizations_start_from_the_exact_weights(
    scheme: str, target: str, floating: Path, tmp_path: Path
) -> None:
    source, plain, _ = quantized(floating, tmp_path, "gptq", symmetric=False, act_order=True)
    ours = exported(source, tmp_path, quantize=scheme, target=target)
    theirs = export(ExportOptions(str(plain), tmp_path / "plain-bundle", quantize=scheme, target=target, verify="none"))
    assert ours.manifest.files["decoder.onnx.data"] == theirs.manifest.files["decoder.onnx.data"]
    assert ours.manifest.evidence[0].figures["kept"] == 0
    assert ours.manifest.block_size == (32 if scheme == "int8" else None)
    if (scheme, target) == ("none", "cpu"):
        with load(ours.folder) as model:
            (completion,) = model.generate([PROMPT], Sampling(max_new_tokens=16, ignore_eos=True))
            assert list(completion.tokens) == greedy(plain, PROMPT, 16)


@pytest.mark.medium
def test_mxfp4_experts_of_gpt_oss(tmp_path: Path) -> None:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64, "sliding_window": 16}
    folder = make_model(tmp_path / "model", "gpt_oss", layer_types=["sliding_attention", "full_attention"], **experts)
    plain, stored = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            parts, plain[name] = made.mxfp4(tensor)
            stored |= {f"{name}_{part}": value.contiguous() for part, value in parts.items()}
        else:
            plain[name] = stored[name] = tensor
    source = made.write_quantized(folder, tmp_path / "quantized", {"quant_method": "mxfp4"}, lambda *_: None)
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})
    bundle = exported(source, tmp_path, quantize="none")
    assert bundle.manifest.source.quantization == "MXFP4"
    with load(bundle.folder) as model:
        (completion,) = model.generate([PROMPT], Sampling(max_new_tokens=16, ignore_eos=True))
    assert list(completion.tokens) == greedy(folder, PROMPT, 16)


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_experts_that_are_quantized_one_by_one_are_merged_with_their_codes(method: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "qwen3_moe", **EXPERTS)
    source, plain, _ = quantized(folder, tmp_path, method, symmetric=False)
    model = empty_model(open_source(str(source)).config, torch.float32)
    with (
        Checkpoint(Files(source), np.dtype(np.float32)) as ours,
        Checkpoint(Files(plain), np.dtype(np.float32)) as theirs,
    ):
        found, wanted = ours.weights(model), theirs.weights(model)
        assert sum(weight.packed is not None for weight in found.values()) == 2 * (4 + 2)
        for name, weight in found.items():
            exact = wanted[name].array()
            assert np.array_equal(weight.array(), exact), name
            if weight.packed is not None:
                rows = exact.reshape(-1, exact.shape[-1])
                assert np.array_equal(restored(weight.packed, rows.shape), rows), name
                last = min(99, len(rows))
                assert np.array_equal(restored(weight.packed, rows.shape, 5, last), rows[5:last]), name


@pytest.mark.medium
@pytest.mark.parametrize(("target", "symmetric"), [("cpu", False), ("cpu", True), ("cuda", True), ("cuda", False)])
def test_experts_keep_their_codes_in_whatever_form_they_are_written(
    target: str, symmetric: bool, tmp_path: Path
) -> None:
    folder = make_model(tmp_path / "model", "qwen3_moe", **EXPERTS)
    source, _, weights = quantized(folder, tmp_path, "gptq", symmetric=symmetric)
    bundle = exported(source, tmp_path, target=target, verify="full" if target == "cpu" else "none")
    # The kernel for a whole mixture is known to have zero points on the CPU only.
    whole = symmetric or target == "cpu"
    counts = node_counts(bundle)
    assert counts["QMoE"] == (2 if whole else 0)
    assert counts["MatMulNBits"] == 2 * 2 + 1 + (0 if whole else 2 * 2 * 4)
    (kept, *others) = bundle.manifest.evidence
    assert kept.figures["kept"] == int(kept.figures["matrices"]) - 2
    assert all(item.passed for item in others)
    check_kept(bundle, weights)


def test_projections_in_other_groups_or_orders_are_not_merged(floating: Path, tmp_path: Path) -> None:
    rules = {"v_proj": {"group_size": 64}, "up_proj": {"bits": 8}}
    source, _, weights = quantized(floating, tmp_path, "gptq", rules=rules)
    bundle = exported(source, tmp_path)
    check_kept(bundle, weights)
    # q and k, v, o, gate, up, down for each layer; the head.
    assert node_counts(bundle)["MatMulNBits"] == 2 * 6 + 1


def test_fp16_targets_keep_the_scales_as_they_are(floating: Path, tmp_path: Path) -> None:
    source, _, weights = quantized(floating, tmp_path, "awq", symmetric=False)
    check_kept(exported(source, tmp_path, target="cuda"), weights)


def test_a_block_size_that_contradicts_the_source_is_refused(floating: Path, tmp_path: Path) -> None:
    source, _, _ = quantized(floating, tmp_path, "gptq")
    with pytest.raises(ExportError, match=r"--block-size 64 contradicts the source.*blocks of 32"):
        exported(source, tmp_path, block_size=64)
    assert exported(source, tmp_path, block_size=32).manifest.block_size == 32


def test_the_configuration_of_a_quantized_source_is_that_of_the_floating_model(floating: Path, tmp_path: Path) -> None:
    source = open_source(str(quantized(floating, tmp_path, "gptq")[0]))
    assert not source.loads_by_itself
    assert not hasattr(source.config, "quantization_config")


@pytest.mark.medium
def test_a_comparison_notices_a_wrong_scale(floating: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fmedge_converters.schemes import kept_codes

    source, _, _ = quantized(floating, tmp_path, "gptq")
    add = kept_codes._add_packed

    def wrong(*arguments: Any, **options: Any) -> Any:
        packed = arguments[3]
        halved = type(packed)(
            packed.bits, packed.block_size, packed.codes, lambda a, b: packed.scales(a, b)[:, ::-1].copy()
        )
        return add(*arguments[:3], halved, **options)

    monkeypatch.setattr(kept_codes, "_add_packed", wrong)
    with pytest.raises(ParityError, match="full"):
        exported(source, tmp_path, verify="full")


def test_codes_without_their_configuration_are_refused(floating: Path, tmp_path: Path) -> None:
    source, _, _ = quantized(floating, tmp_path, "gptq")
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=r"a quantizer's codes, but config\.json has no quantization_config"):
        exported(source, tmp_path)
