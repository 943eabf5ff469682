"""What is written for TensorRT: rounding, plans and profiles, and that its graphs compute what PyTorch computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from fmedge_converters import rtx
from fmedge_converters.build import BuildOptions, BuiltDecoder, build_decoder
from fmedge_converters.checkpoint import Files
from fmedge_converters.decoder import quiet_libraries
from fmedge_converters.device_plan import ROWS, Needs, plan_device
from fmedge_converters.evidence import graph_evidence, text_facts
from fmedge_converters.export import export
from fmedge_converters.export_options import ExportOptions
from fmedge_converters.graph import DecoderGraph
from fmedge_converters.parts.part import Call, Input
from fmedge_converters.passes.gelu import decompose_gelu
from fmedge_converters.passes.linear import insert_linear, linears
from fmedge_converters.plain_graph import require_plain
from fmedge_converters.profiles import PartSizes, decoder_profiles, part_profiles
from fmedge_converters.reduced import write_random_model
from fmedge_converters.rounding import Rounding, round_blocks
from fmedge_converters.schemes.dequantize_linear import dequantize_linear
from fmedge_converters.targets import TARGETS, find_scheme, find_target
from fmedge_converters.weight import weight_from_array
from fmedge_runtimes.bundle import Bundle, open_bundle
from fmedge_runtimes.decoder import Decoder
from fmedge_runtimes.devices import DEVICES
from fmedge_runtimes.errors import ExportError
from fmedge_runtimes.golden import continue_greedily
from fmedge_runtimes.manifest import ImageFacts
from fmedge_runtimes.onnxruntime_session import OnnxRuntimeSession
from hypothesis import given, settings
from hypothesis import strategies as st
from models import greedy, make_model
from tiny import tiny_config
from transformers import AutoConfig, AutoModelForCausalLM

from fmedge.commands.inspect import show

PROMPTS = ([3, 7, 11, 19, 23, 4, 8], [5], [9, 2, 40, 41, 42])
STEPS = (12, 12, 5)
needs_rtx = pytest.mark.skipif(not rtx.is_available(), reason="TensorRT-RTX has wheels for Linux on x86-64 only")


# Rounding


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([(4, 16), (4, 32), (8, 64), (8, 0)]),
    st.sampled_from([torch.float16, torch.float32]),
    st.sampled_from([1e-9, 1e-4, 1.0, 300.0]),
    st.booleans(),
)
def test_positive_scales_have_a_code_for_every_weight_and_are_searched(seed, kind, dtype, spread, search):
    bits, block = kind
    rows = torch.from_numpy(np.random.default_rng(seed).standard_normal((3, 64)).astype(np.float32) * spread)
    rows[1] = 0
    plain, made = (
        round_blocks(rows, Rounding(bits, block, search=given, positive=True), None, dtype) for given in (False, search)
    )
    half = 1 << (bits - 1)
    assert (made.scales > 0).all() and torch.equal(made.scales, made.scales.to(dtype).float())
    assert (made.codes[1] == half).all()
    found, least = (one.dequantized(64).unflatten(1, (-1, block or 64)) for one in (made, plain))
    blocks = rows.unflatten(1, (-1, block or 64))
    step = torch.maximum(blocks.amax(-1) / (half - 1), blocks.amin(-1) / -half).clamp(min=6e-8)  # [3, blocks]
    # The type of the scales rounds them, too, and has so many steps of that at the far end.
    off = (step * torch.finfo(dtype).eps).clamp(min=6e-8 if dtype is torch.float16 else 0)
    assert ((least - blocks).abs().amax(-1) <= 0.51 * step + half * off).all()
    # The search is for the direction; a block gets its length back.
    length = (found * blocks).sum(-1, keepdim=True) / found.square().sum(-1, keepdim=True).clamp(min=1e-30)
    errors = (found * length - blocks).square().sum(-1)
    assert (errors <= (least - blocks).square().sum(-1) * 1.001 + 1e-4 * blocks.square().sum(-1)).all()


def linear_graph(weight: np.ndarray, bias: np.ndarray | None, rounding: Rounding | None = None) -> DecoderGraph:
    x = ir.val("x", ir.DataType.FLOAT, ["rows", weight.shape[1]])
    model = ir.Model(ir.Graph([x], [], nodes=[], opset_imports={"": 21}, name="linear"), ir_version=10)
    graph = DecoderGraph(model, {})
    matrix = graph.add_weight("w", replace(weight_from_array(weight), rounding=rounding))
    addend = None if bias is None else graph.add_weight("b", weight_from_array(bias))
    end = ir.node("Identity", [x])
    model.graph.append(end)
    made = insert_linear(graph, end, x, matrix, addend, x)
    end.replace_input_with(0, made)
    end.outputs[0].name, end.outputs[0].type, end.outputs[0].shape = "y", made.type, made.shape
    model.graph.outputs.append(end.outputs[0])
    return graph


@pytest.mark.parametrize(
    ("outputs", "size", "bits", "stored"),
    [
        (6, 64, 4, ("INT4", 32)),
        (6, 48, 4, ("INT4", 16)),
        (6, 40, 4, ("INT8", None)),
        (5, 64, 4, ("INT8", None)),
        (6, 64, 8, ("INT8", None)),
    ],
)
def test_a_dequantized_product_is_the_product_with_the_rounded_weights(outputs, size, bits, stored, tmp_path):
    random = np.random.default_rng(1)
    weight = random.standard_normal((outputs, size)).astype(np.float32)
    bias, x = random.standard_normal(outputs).astype(np.float32), random.standard_normal((3, size)).astype(np.float32)
    graph = linear_graph(weight, bias)
    (linear,) = linears(graph)
    dequantize_linear("int", "", bits).linear(graph, linear, is_head=False, block_size=32)
    graph.remove_unused()
    codes = next(value for name, value in graph.graph.initializers.items() if name.endswith("codes"))
    assert codes.dtype is not None and codes.dtype.name == stored[0]
    path = tmp_path / "linear.onnx"
    path.write_bytes(ir.to_proto(graph.model).SerializeToString())
    onnx.checker.check_model(str(path), full_check=True)
    session = OnnxRuntimeSession(path, "cpu", None)
    found = session.run({"x": x}, {})["y"]
    block = stored[1] or size
    width = 4 if stored[0] == "INT4" else 8
    made = round_blocks(torch.from_numpy(weight), Rounding(width, block, positive=True))
    assert codes.const_value is not None
    integers = made.codes.flatten(1).numpy().astype(int) - (1 << (width - 1))
    assert np.array_equal(codes.const_value.numpy().astype(int), integers.T)
    wide = made.dequantized(size).numpy()
    assert np.allclose(found, x @ wide.T + bias, atol=1e-4)
    assert not np.allclose(found, x @ weight.T + bias, atol=1e-4)


def test_zero_points_are_refused():
    graph = linear_graph(np.ones((4, 32), np.float32), None, Rounding(4, 32, symmetric=False))
    with pytest.raises(ExportError, match="w is to have 4 bits and zero points"):
        dequantize_linear("int4", "", 4).linear(graph, linears(graph)[0], is_head=False, block_size=32)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_is_what_it_is_made_of(approximate, tmp_path):
    x = ir.val("x", ir.DataType.FLOAT, [64])
    node = ir.node("Gelu", [x], {"approximate": approximate})
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = "y", x.type, x.shape
    inner = ir.Graph([x], [node.outputs[0]], nodes=[node], opset_imports={"": 20}, name="gelu")
    graph = DecoderGraph(ir.Model(inner, ir_version=10), {})
    assert decompose_gelu(graph, 0) == 1
    assert all(item.op_type != "Gelu" for item in graph.graph)
    path = tmp_path / "gelu.onnx"
    path.write_bytes(ir.to_proto(graph.model).SerializeToString())
    values = np.linspace(-6, 6, 64, dtype=np.float32)
    found = OnnxRuntimeSession(path, "cpu", None).run({"x": values}, {})
    wanted = torch.nn.functional.gelu(torch.from_numpy(values), approximate=approximate).numpy()
    assert np.allclose(next(iter(found.values())), wanted, atol=1e-6)


# Targets, devices, plans


def test_devices_are_targets():
    assert find_target("orin-nano-8gb").name == "tensorrt-compat"
    assert find_target("orin-nano-8gb-jp7.2").name == "tensorrt"
    assert find_target("thor").name == "tensorrt"
    assert {device.target for device in DEVICES.values()} <= set(TARGETS)
    assert all(0 < device.usable < device.memory for device in DEVICES.values())
    assert all(name == device.name for name, device in DEVICES.items())
    with pytest.raises(ExportError, match=r"no target orin-micro; choose one of cpu, .*orin-nano-4gb"):
        find_target("orin-micro")


def test_fp8_is_for_gpus_that_multiply_it():
    for images in (False, True):
        for name in ("thor", "thor-jp7.0", "rtx", "tensorrt"):
            assert find_scheme(find_target(name), "fp8", images=images).name == "fp8"
        for name in DEVICES:
            if name.startswith(("orin", "agx-orin")):
                with pytest.raises(ExportError, match=r"has compute capability 8\.7, .* choose w8a8"):
                    find_scheme(find_target(name), "fp8", images=images)
    assert all(device.fp8 == (float(device.compute_capability) >= 8.9) for device in DEVICES.values())


def test_a_plan_gives_context_before_rows_and_says_what_does_not_fit():
    device = DEVICES["orin-nano-8gb"]
    small = plan_device(device, Needs(weights=10**9, token=10**4, logits=3 * 10**5), 4096, asked=False)
    assert (small.context, small.rows) == (4096, ROWS)
    wide = plan_device(device, Needs(weights=10**9, token=10**6, logits=3 * 10**5), 4096, asked=False)
    assert wide.context % 64 == 0 and 256 <= wide.context < 4096 and wide.rows == 1
    assert wide.needs.fixed + wide.context * 10**6 <= device.usable < wide.needs.fixed + (wide.context + 64) * 10**6
    with pytest.raises(ExportError, match=r"does not fit on orin-nano-8gb: .*weights 1\.00 GB.*--context"):
        plan_device(device, Needs(weights=10**9, token=10**6, logits=3 * 10**5), 8192, asked=True)
    with pytest.raises(ExportError, match=r"weights 14\.00 GB"):
        plan_device(device, Needs(weights=14 * 10**9, token=10**4, logits=3 * 10**5), 4096, asked=False)


def test_profiles_cover_every_dynamic_axis_within_what_a_part_takes():
    prefill, decode = decoder_profiles(4, 100)
    assert prefill.axes == {"batch": (1, 1, 1), "sequence": (1, 100, 100), "logits": (1, 1, 100)}
    assert decode.axes["batch"] == (1, 1, 4) and decode.axes["sequence"] == (1, 1, 1)
    image = ImageFacts(pipeline="P", height=512, width=768, steps=1, guidance=7.5)
    inputs = (
        Input("sample", ("batch", 4, "height", "width")),
        Input("timestep", ("batch",)),
        Input("text", ("batch", "sequence", 8)),
    )
    call = Call(inputs, lambda *_: {}, multiples={"height": 10}, limits={"sequence": 40})
    (profile,) = part_profiles(call, PartSizes(image, factor=8))
    assert profile.axes == {
        "batch": (1, 2, 8),
        "height": (40, 70, 130),
        "width": (32, 96, 192),
        "sequence": (1, 40, 40),
    }


# Graphs


def build(folder: Path, output: Path, target: str, dtype: torch.dtype, scheme: str = "none") -> BuiltDecoder:
    output.mkdir()
    row = replace(TARGETS[target], dtype=dtype)
    options = BuildOptions(row, row.schemes[scheme], None, 100)
    return build_decoder(AutoConfig.from_pretrained(folder), Files(folder), output, options, lambda *_: None)


def continued(built: BuiltDecoder) -> list[list[int]]:
    session = OnnxRuntimeSession(built.written.graph, "cpu", None)
    try:
        rows = continue_greedily(Decoder(session, text_facts(built, 100)), PROMPTS, STEPS)
    finally:
        session.close()
    return [[step.token for step in row] for row in rows]


@pytest.mark.medium
@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-compat"])
def test_windows_and_softcaps_in_a_ragged_batch_give_the_tokens_of_pytorch(target, tmp_path):
    """gemma2 has layers with and without a window, caps its scores, and its heads are scaled by a number of its own."""
    folder = make_model(tmp_path / "model", "gemma2", sliding_window=6)
    built = build(folder, tmp_path / "out", target, torch.float32)
    assert continued(built) == [greedy(folder, prompt, steps) for prompt, steps in zip(PROMPTS, STEPS, strict=True)]
    session = OnnxRuntimeSession(built.written.graph, "cpu", None)
    decoder = Decoder(session, text_facts(built, 100))
    text = np.random.default_rng(0).integers(1, built.vocabulary, 40).tolist()
    with quiet_libraries(), torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        wanted = model(torch.tensor([text])).logits[0].numpy()  # [S, V]
    # Tokens of a random model hardly depend on one position more or less; logits do.
    assert np.abs(decoder.score(decoder.new_cache(), text) - wanted).max() < 2e-4 * np.abs(wanted).max()
    session.close()
    caches = built.caches
    assert {cache.window for cache in caches} == {6, None}
    assert all(cache.capacity == 128 and not cache.rolling for cache in caches)
    assert all(cache.in_place == (target == "tensorrt") for cache in caches)


ARCHITECTURES = ("qwen3", "gemma3_text", "phi", "gpt2", "mixtral", "gpt_oss", "bloom", "deepseek_v3", "ctrl")


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-compat"])
def test_architectures_give_the_tokens_of_pytorch_and_build(model_type, target, tmp_path):
    config = tiny_config(model_type)
    evidence = graph_evidence(config, TARGETS[target], lambda *_: None)
    assert evidence.passed, evidence.figures
    if not rtx.is_available():
        return
    write_random_model(config, tmp_path / "model", seed=0)
    row = TARGETS[target]
    options = BuildOptions(row, row.schemes["none"], None, 100)
    built = build_decoder(config, Files(tmp_path / "model"), tmp_path, options, lambda *_: None)
    found = rtx.build(built.written.graph, decoder_profiles(4, 100))
    assert found.problems == () and found.engine is not None


def test_operators_of_other_domains_are_refused_by_name():
    """mamba and lfm2, for example, have CausalConvWithState."""
    graph = linear_graph(np.ones((4, 32), np.float32), None)
    dequantize_linear("int4", "", 4).linear(graph, linears(graph)[0], is_head=False, block_size=32)
    graph.remove_unused()
    require_plain(graph, "tensorrt")
    graph.graph.append(ir.node("CausalConvWithState", list(graph.graph.inputs), domain="com.microsoft"))
    with pytest.raises(ExportError, match=r"target tensorrt has no com\.microsoft::CausalConvWithState"):
        require_plain(graph, "tensorrt")


@pytest.fixture(scope="session")
def engine_bundle(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny Llama for a device with JetPack 7.2, in int4."""
    output = tmp_path_factory.mktemp("tensorrt") / "bundle"
    return export(ExportOptions(str(llama), output, target="orin-nano-8gb-jp7.2", quantize="int4", context=150))


@pytest.mark.medium
def test_a_bundle_for_a_device_says_so_and_runs_on_the_cpu(engine_bundle: Bundle, capsys: pytest.CaptureFixture[str]):
    import fmedge

    manifest = open_bundle(engine_bundle.folder).manifest
    assert (manifest.target, manifest.device) == ("tensorrt", "orin-nano-8gb-jp7.2")
    assert all(item.passed for item in manifest.evidence) and len(manifest.golden) == 2
    decoder = manifest.graphs["decoder"]
    assert [profile.name for profile in decoder.profiles] == ["prefill", "decode"]
    axes = {dim for item in decoder.inputs for dim in item.shape if isinstance(dim, str)}
    assert all(set(profile.axes) == axes for profile in decoder.profiles)
    past = next(item for item in decoder.inputs if item.name == "past_key_values.0.key")
    assert (past.dtype, past.shape) == ("float16", ("batch", 2, 192, 16))
    graph = onnx.load(engine_bundle.file(decoder.file), load_external_data=False).graph
    assert all(node.domain == "" for node in graph.node)
    assert {"TensorScatter", "Attention", "DequantizeLinear"} <= {node.op_type for node in graph.node}
    show(engine_bundle, as_json=False)
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    # Where 128 does not divide the width, smaller blocks do.
    facts = "quantization int4, blocks of 64, 7.045 bits per weight with scales"
    assert lines["target"] == f"tensorrt for orin-nano-8gb-jp7.2, {facts}"
    assert lines["device"].startswith("Jetson Orin Nano 8GB, JetPack 7.2: weights 0.00 GB, cache 0.00 GB for 8 rows")
    with fmedge.load(engine_bundle.folder, device="cpu", max_batch=2) as model:
        made = model.generate([list(golden.prompt) for golden in manifest.golden], fmedge.Sampling(max_new_tokens=8))
    wanted = [[step.token for step in golden.steps[:8]] for golden in manifest.golden]
    assert [list(item.tokens) for item in made] == wanted


@pytest.mark.medium
@needs_rtx
def test_tensorrt_rtx_parses_and_builds_a_decoder_with_both_profiles(engine_bundle: Bundle):
    decoder = engine_bundle.manifest.graphs["decoder"]
    graph = engine_bundle.file(decoder.file)
    assert rtx.parse(graph) == ()
    built = rtx.build(graph, decoder.profiles)
    assert built.problems == () and built.engine is not None and len(built.engine) > 1000


@pytest.mark.medium
@needs_rtx
def test_tensorrt_rtx_says_what_it_refuses(engine_bundle: Bundle, bundle: Path, tmp_path: Path):
    problems = rtx.parse(bundle / "decoder.onnx")
    assert problems and all(problem.message for problem in problems)
    model = onnx.load(engine_bundle.file("decoder.onnx"), load_external_data=False)
    attention = next(node for node in model.graph.node if node.op_type == "Attention")
    attention.attribute.append(onnx.helper.make_attribute("softcap", 20.0))
    (tmp_path / "decoder.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "decoder.onnx.data").hardlink_to(engine_bundle.file("decoder.onnx.data"))
    problems = rtx.parse(tmp_path / "decoder.onnx")
    assert any(problem.operator == "Attention" for problem in problems), problems
    assert rtx.build(tmp_path / "decoder.onnx", ()).engine is None
