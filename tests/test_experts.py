"""Mixtures of experts: each form against transformers' own loop over the experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from experts_graph import CHOSEN, EXPERTS, HIDDEN, KINDS, graph, operators, session, traced
from fmedge_converters.export import export
from fmedge_converters.export_options import ExportOptions
from fmedge_converters.graph import DecoderGraph
from fmedge_converters.large_tensors import LARGE, LargeOnMeta
from fmedge_converters.passes.expert_activation import Activation, activation_between
from fmedge_converters.passes.mixture import expert_linears
from fmedge_converters.passes.sign import never_negative
from fmedge_converters.quantize import quantize
from fmedge_converters.reduced import reduced_config
from fmedge_converters.rounding import Rounding, round_blocks
from fmedge_converters.schemes.qmoe import qmoe
from fmedge_converters.schemes.weight_only import QuantizedMatrix, weight_only
from fmedge_converters.targets import TARGETS
from fmedge_converters.weight import Weight, weight_from_array
from hypothesis import given, settings
from hypothesis import strategies as st
from models import make_model
from transformers import AutoConfig

BLOCK = 32
DIFFERENCES = {("cpu", "none"): 2e-6, ("cuda", "none"): 2e-3, "int8": 0.04, "int4": 0.3}
"""Largest mean difference to PyTorch, of the mean magnitude."""
QUICK = ("silu", "clamped", "gelu")
Routing = tuple[np.ndarray, np.ndarray, np.ndarray]
"""x [T, H], index [T, k] and weights [T, k]."""


def routing(tokens: int, seed: int = 0, chosen: int = CHOSEN, among: int = EXPERTS) -> Routing:
    """Random tokens, each with different experts of the first `among`."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((tokens, HIDDEN)).astype(np.float32)
    index = np.argsort(random.random((tokens, among)), axis=1)[:, :chosen]
    return x, index, random.random((tokens, chosen)).astype(np.float32)


def difference(
    opened: onnxruntime.InferenceSession, routed: Routing, kind: str, dtype: torch.dtype = torch.float32, **how: Any
) -> float:
    """Mean difference to PyTorch over the mean magnitude of PyTorch's result."""
    layer, _, _ = traced(kind, dtype=dtype, **how)
    kept = np.float16 if dtype == torch.float16 else np.float32
    x, index, weights = routed[0].astype(kept), routed[1], routed[2].astype(kept)
    (found, _) = opened.run(None, {"x": x, "index": index, "weights": weights})
    wanted = layer.reference(x.astype(np.float32), index, weights.astype(np.float32))
    return float(np.abs(found - wanted).mean() / np.abs(wanted).mean())


@pytest.mark.parametrize(
    ("target", "scheme", "kind"),
    [
        pytest.param(target, scheme, kind, marks=() if target == "cpu" and kind in QUICK else pytest.mark.medium)
        for target in ("cpu", "cuda")
        for scheme in ("none", "int8", "int4")
        for kind in KINDS
    ],
)
def test_experts_compute_what_pytorch_computes(target: str, scheme: str, kind: str, tmp_path: Path) -> None:
    row = TARGETS[target]
    spelled = row.schemes[scheme]
    made = graph(kind, spelled, BLOCK if spelled.block_size else 0, dtype=row.dtype)
    kernel = kind in ("silu", "clamped", "limited") and scheme != "none"
    assert operators(made).get("QMoE", 0) == int(kernel)
    opened = session(made, tmp_path)
    limit = DIFFERENCES.get((target, scheme), DIFFERENCES.get(scheme))
    for routed in (routing(1), routing(7), routing(33), routing(9, among=CHOSEN)):
        assert difference(opened, routed, kind, row.dtype) < limit


FORMS: dict[str, Activation | None] = {
    "silu": Activation("swiglu"),
    "clamped": Activation("swiglu", interleaved=True, alpha=float(np.float32(1.702)), beta=1.0, limit=1.0),
    "limited": Activation("swiglu", alpha=float(np.float32(1.702)), beta=1.0, limit=1.0),
    "gelu": None,
    "relu2": None,
    "normed": Activation("swiglu"),
}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.medium) for kind in KINDS]
)
def test_activations_are_recognised_by_what_they_compute(kind: str) -> None:
    made = graph(kind, None)
    up, down = expert_linears(made)
    assert activation_between(made, up.output, down.rows) == FORMS[kind]


def forms(chosen: int, folder: Path) -> dict[str, onnxruntime.InferenceSession]:
    """The plain form and the kernel with the same codes, neither rounding activations, and the plain form in fp32."""
    plain, kernel = (
        weight_only("test", "", 4, head_bits=8, accuracy_level=0, mixture=mixture) for mixture in (None, qmoe(4))
    )
    opened = {}
    for name, scheme, block in (("plain", plain, BLOCK), ("kernel", kernel, BLOCK), ("fp32", FP32, 0)):
        made = graph("silu", scheme, block, chosen=chosen)
        assert operators(made).get("QMoE", 0) == int(name == "kernel")
        (folder / name).mkdir()
        opened[name] = session(made, folder / name)
    return opened


FP32 = TARGETS["cpu"].schemes["none"]


@pytest.mark.parametrize("chosen", [1, CHOSEN])
def test_any_routing_is_followed(chosen: int, tmp_path: Path) -> None:
    opened = forms(chosen, tmp_path)

    @settings(deadline=None, max_examples=40)
    @given(
        tokens=st.integers(1, 40),
        among=st.integers(chosen, EXPERTS),
        levels=st.sampled_from([0, 1, 3]),
        scale=st.sampled_from([1e-3, 1.0, 2.5]),
        seed=st.integers(0, 999),
    )
    def check(tokens: int, among: int, levels: int, scale: float, seed: int) -> None:
        x, index, weights = routing(tokens, seed, chosen, among)
        # Few levels make ties and zeros.
        routed = x, index, (np.round(weights * levels) if levels else weights).astype(np.float32) * np.float32(scale)
        feeds = dict(zip(("x", "index", "weights"), routed, strict=True))
        results = {name: one.run(None, feeds)[0] for name, one in opened.items()}
        wanted = traced("silu", chosen=chosen)[0].reference(*routed)
        np.testing.assert_allclose(results["fp32"], wanted, atol=2e-5 * scale, rtol=1e-5)
        np.testing.assert_allclose(results["kernel"], results["plain"], atol=2e-5 * scale, rtol=1e-4)

    check()


def test_weights_that_may_be_negative_keep_the_plain_form(tmp_path: Path) -> None:
    made = graph("silu", TARGETS["cpu"].schemes["int8"], signed=True)
    assert "QMoE" not in operators(made)
    x, index, weights = routing(9)
    routed = x, index, weights - np.float32(0.5)
    assert difference(session(made, tmp_path), routed, "silu", signed=True) < DIFFERENCES["int8"]


@pytest.mark.parametrize("transposed", [False, True])
def test_a_stack_of_products_becomes_one_for_each_matrix(transposed: bool, tmp_path: Path) -> None:
    """As models write them that run every expert on every token."""
    matrices = np.random.default_rng(0).standard_normal((3, 5, 4) if transposed else (3, 4, 5)).astype(np.float32)
    swap = "m = Transpose<perm=[0, 2, 1]>(w) p = MatMul(x, m)" if transposed else "p = MatMul(x, w)"
    shapes = "float[3, N, 4] x, float[3, 5, 6] other, float[3, 4, 5] w"
    head = "<ir_version: 10, opset_import: ['' : 21]> g"
    text = f"{head} ({shapes}) => (float[3, N, 6] y) {{ {swap} y = MatMul(p, other) }}"
    made = DecoderGraph(ir.from_proto(onnx.parser.parse_model(text.replace("'", '"'))), {})
    declared = made.graph.inputs.pop()
    declared.replace_all_uses_with(made.add_weight("matrices", weight_from_array(matrices)))
    quantize(made, FP32, 0)
    assert operators(made) == {"Split": 1, "MatMul": 4, "Concat": 1}
    random = np.random.default_rng(1)
    x, other = (random.standard_normal(shape).astype(np.float32) for shape in ((3, 7, 4), (3, 5, 6)))
    (found,) = session(made, tmp_path).run(None, {"x": x, "other": other})
    wanted = x @ (matrices.transpose(0, 2, 1) if transposed else matrices) @ other
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("p = Softmax(x) v, i = TopK(p, k) s = ReduceSum<keepdims=1>(v) y = Div(v, s)", True),
        ("p = Sigmoid(x) y = Mul(p, positive)", True),
        ("p = Sigmoid(x) y = Mul(p, mixed)", False),
        ("p = Sigmoid(x) y = Sub(p, positive)", False),
        ("y = Identity(x)", False),
    ],
)
def test_what_is_never_negative(text: str, answer: bool) -> None:
    head = "<ir_version: 10, opset_import: ['' : 21]> g (float[2, 3] x, int64[1] k) => (float[2, 3] y)"
    constants = "<float[3] positive = {0, 1, 2}, float[3] mixed = {0, 1, -2}>"
    model = ir.from_proto(onnx.parser.parse_model(f"{head} {constants} {{ {text} }}".replace("'", '"')))
    assert never_negative(DecoderGraph(model, {}), model.graph.outputs[0]) is answer


def test_experts_are_quantized_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fmedge_converters.weight.CHUNK_BYTES", 2 * 24 * 64 * 4)
    weights = np.random.default_rng(0).standard_normal((5, 24, 64)).astype(np.float32)
    asked: list[int] = []

    def read(start: int, stop: int) -> np.ndarray:
        asked.append(stop - start)
        return weights[start:stop]

    made = QuantizedMatrix(Weight(weights.shape, weights.dtype, read), Rounding(4, 32))
    rounded = round_blocks(torch.from_numpy(weights.reshape(-1, 64)), Rounding(4, 32), None, torch.bfloat16)
    codes, scales = rounded.packed_codes().numpy(), rounded.scales.numpy()
    assert np.array_equal(np.concatenate(list(made.codes.blocks())), codes.reshape(5, 24, 2, 16))
    assert np.array_equal(np.concatenate(list(made.scales.blocks())), scales.reshape(5, 24, 2))
    assert asked == [2, 2, 1]
    # Asked for again, or in other pieces, they are made again.
    assert np.array_equal(made.scales.array(), scales.reshape(5, 24, 2))


def test_large_tensors_are_not_allocated() -> None:
    with LargeOnMeta():
        large, small, placed = torch.empty(LARGE), torch.empty(8), torch.zeros(LARGE, device="cpu")
    assert (large.device.type, small.device.type, placed.device.type) == ("meta", "cpu", "cpu")


@pytest.mark.parametrize(
    ("model_type", "experts", "layers"),
    [("qwen3_moe", 16, 2), ("deepseek_v3", 16, 4), ("mixtral", 8, 2), ("gpt_oss", 8, 2)],
)
def test_the_small_model_of_the_proof_has_few_experts_and_every_kind_of_layer(
    model_type: str, experts: int, layers: int
) -> None:
    small = reduced_config(AutoConfig.for_model(model_type))
    assert (small.num_local_experts, small.num_hidden_layers) == (experts, layers)
    assert small.num_experts_per_tok == AutoConfig.for_model(model_type).num_experts_per_tok
    if model_type == "deepseek_v3":  # the first three layers have no experts; a group must hold its share of them
        assert small.n_group == 8
        assert small.topk_group * small.n_routed_experts // small.n_group >= small.num_experts_per_tok


@pytest.mark.medium
def test_routers_are_not_quantized_and_shared_experts_are(tmp_path: Path) -> None:
    folder = make_model(
        tmp_path / "model", "qwen2_moe", num_experts=6, num_experts_per_tok=2, moe_intermediate_size=96,
        shared_expert_intermediate_size=64,
    )  # fmt: skip
    made = export(ExportOptions(str(folder), tmp_path / "bundle", quantize="int8", verify="full"))
    full = made.manifest.evidence[-1]
    assert full.passed
    nodes = onnx.load(made.file("decoder.onnx"), load_external_data=False).graph
    shapes = {item.name: tuple(item.dims) for item in nodes.initializer}
    products = [shapes[node.input[1]] for node in nodes.node if node.op_type == "MatMul"]
    assert products == [(64, 6), (64, 6)]
    counts = {name: sum(node.op_type == name for node in nodes.node) for name in ("QMoE", "MatMulNBits")}
    # Each layer: q, k and v, the output, gate and up of the shared expert with its own gate, down; and the head.
    assert counts == {"QMoE": 2, "MatMulNBits": 9}
