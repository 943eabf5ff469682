"""A cache in int8: what ONNX Runtime's operator computes with one, and what an export makes of that."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from fmedge_converters import int8_cache
from fmedge_converters.export import export
from fmedge_converters.export_options import ExportOptions
from fmedge_converters.reduced import write_random_model
from fmedge_runtimes.bundle import Bundle, open_bundle
from fmedge_runtimes.decoder import Decoder
from fmedge_runtimes.errors import ExportError
from fmedge_runtimes.load import load
from fmedge_runtimes.onnxruntime_session import OnnxRuntimeSession
from fmedge_runtimes.plan import plan
from fmedge_runtimes.sampling import Sampling
from models import make_model
from tiny import tiny_config

pytestmark = pytest.mark.usefixtures("traced_once")
HEADS, KV_HEADS, SIZE, CAPACITY = 4, 2, 16, 64
WIDTHS = (HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE)
ANGLES = np.arange(512)[:, None] / 10000.0 ** (np.arange(SIZE // 2) / (SIZE // 2))
COS, SIN = np.cos(ANGLES).astype(np.float32), np.sin(ANGLES).astype(np.float32)


def operator(key_scale: np.ndarray, value_scale: np.ndarray, **attributes: int | float) -> onnxruntime.InferenceSession:
    """GroupQueryAttention as fmedge's graphs have it: packed projections, rotary inside, int8 per channel."""
    floats, codes, numbers = ir.DataType.FLOAT, ir.DataType.INT8, ir.DataType.INT32
    axes = ["batch", KV_HEADS, "capacity", SIZE]
    packed = ir.val("packed", dtype=floats, shape=["batch", "sequence", sum(WIDTHS)])
    past = [ir.val(name, dtype=codes, shape=axes) for name in ("past_key", "past_value")]
    lengths = [ir.val("seqlens_k", dtype=numbers, shape=["batch"]), ir.val("total", dtype=numbers, shape=[])]
    arrays = {"cos": COS, "sin": SIN, "key_scale": key_scale, "value_scale": value_scale}
    given = {name: ir.val(name, const_value=ir.tensor(array, name=name)) for name, array in arrays.items()}
    outputs = [ir.val("output", dtype=floats, shape=["batch", "sequence", HEADS * SIZE])]
    outputs += [ir.val(name, dtype=codes, shape=axes) for name in ("present_key", "present_value")]
    inputs = [packed, None, None, *past, *lengths, given["cos"], given["sin"], None, None, None]
    quantized = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
    node = ir.node(
        "GroupQueryAttention",
        [*inputs, given["key_scale"], given["value_scale"]],
        {"num_heads": HEADS, "kv_num_heads": KV_HEADS, "scale": SIZE**-0.5, "do_rotary": 1, **quantized, **attributes},
        domain="com.microsoft",
        outputs=outputs,
    )
    graph = ir.Graph(
        [packed, *past, *lengths],
        outputs,
        nodes=[node],
        initializers=list(given.values()),
        opset_imports={"": 24, "com.microsoft": 1},
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(
        ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString(), options, ["CPUExecutionProvider"]
    )


def step(session: onnxruntime.InferenceSession, packed: np.ndarray, caches: list[np.ndarray], past: list[int]):
    """Append tokens [B, S] to the caches, in place; the output [B, S, H * D]."""
    binding = session.io_binding()
    batch, length, _ = packed.shape
    binding.bind_cpu_input("packed", np.ascontiguousarray(packed))
    binding.bind_cpu_input("seqlens_k", np.array(past, np.int32) + np.int32(length - 1))
    binding.bind_cpu_input("total", np.array(max(past) + length, np.int32))
    output = np.empty((batch, length, HEADS * SIZE), np.float32)
    binding.bind_output("output", "cpu", 0, np.float32, output.shape, output.ctypes.data)
    for name, cache in zip(("key", "value"), caches, strict=True):
        binding.bind_input(f"past_{name}", "cpu", 0, np.int8, cache.shape, cache.ctypes.data)
        binding.bind_output(f"present_{name}", "cpu", 0, np.int8, cache.shape, cache.ctypes.data)
    session.run_with_iobinding(binding)
    return output


def attention(packed: np.ndarray, key_scale: np.ndarray, value_scale: np.ndarray, window: int | None) -> np.ndarray:
    """What attention [S, H * D] over rounded keys and values is, in float64."""
    length = len(packed)
    parts = np.split(packed.astype(np.float64), np.cumsum(WIDTHS)[:-1], axis=-1)
    query, key, value = (part.reshape(length, -1, SIZE) for part in parts)  # [S, N, D]
    cos, sin = COS[:length, None], SIN[:length, None]

    def turned(x: np.ndarray) -> np.ndarray:
        first, second = x[..., : SIZE // 2], x[..., SIZE // 2 :]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    query, key = turned(query), turned(key)
    key, value = (
        np.clip(np.round(states.swapaxes(0, 1) / scale[0]), -128, 127) * scale[0]
        for states, scale in ((key, key_scale), (value, value_scale))
    )  # [K, S, D]
    places = np.arange(length)
    seen = places[:, None] >= places
    if window is not None:
        seen &= places[:, None] - places < window
    output = np.empty((length, HEADS, SIZE))
    for head in range(HEADS):
        shared = head * KV_HEADS // HEADS
        scores = np.where(seen, query[:, head] @ key[shared].T * SIZE**-0.5, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        output[:, head] = weights / weights.sum(axis=-1, keepdims=True) @ value[shared]
    return output.reshape(length, -1)


@pytest.mark.parametrize(
    ("window", "capacity", "attributes"),
    [
        (None, CAPACITY, {}),
        (9, CAPACITY, {"local_window_size": 9}),
        (9, 14, {"local_window_size": 9, "sliding_window_cache": 1}),
    ],
    ids=["whole", "window", "rolling"],
)
def test_the_operator_attends_over_what_it_keeps(window: int | None, capacity: int, attributes: dict[str, int]) -> None:
    random = np.random.default_rng(0)
    # Some values are beyond the scales' reach: they are cut off, not wrapped around.
    scales = [random.uniform(0.005, 0.03, (1, KV_HEADS, 1, SIZE)).astype(np.float32) for _ in range(2)]
    session = operator(*scales, **attributes)
    caches = [np.zeros((4, KV_HEADS, capacity, SIZE), np.int8) for _ in range(2)]
    texts = [random.standard_normal((length, sum(WIDTHS))).astype(np.float32) for length in (40, 23, 8)]
    expected = [attention(text, *scales, window) for text in texts]
    for row, text in enumerate(texts):
        views = [cache[row : row + 1] for cache in caches]
        for start in range(0, len(text) - 3, 7):
            chunk = text[None, start : min(start + 7, len(text) - 3)]
            found = step(session, chunk, views, [start])
            assert found[0] == pytest.approx(expected[row][start : start + chunk.shape[1]], abs=1e-5)
    for number in range(3):
        past = [len(text) - 3 + number for text in texts]
        now = np.stack([text[length : length + 1] for text, length in zip(texts, past, strict=True)])
        found = step(session, now, [cache[:3] for cache in caches], past)
        for row, length in enumerate(past):
            assert found[row, 0] == pytest.approx(expected[row][length], abs=1e-5)
    assert max(abs(int(cache[0].min())) for cache in caches) == 128
    assert not any(cache[3].any() for cache in caches)


def exported(folder: Path, tmp_path: Path, **changes: object) -> Bundle:
    return export(ExportOptions(str(folder), tmp_path / "int8", **{"verify": "none", "cache": "int8", **changes}))


@pytest.mark.medium
def test_a_cache_takes_a_quarter_and_the_manifest_says_what_it_costs(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    floats = export(ExportOptions(str(folder), tmp_path / "floats", verify="none"))
    bundle = exported(folder, tmp_path, verify="full")
    facts = bundle.manifest.text
    assert facts.cache_dtype == "float32"
    assert [cache.quantization for cache in facts.caches] == ["int8", "int8"]
    assert {item.dtype for item in bundle.manifest.graphs["decoder"].inputs if "past" in item.name} == {"int8"}
    assert open_bundle(bundle.folder) == bundle
    graph, cache, full = bundle.manifest.evidence
    assert [item.name for item in (graph, cache, full)] == ["graph", "cache", "full"]
    assert all(item.passed for item in (graph, cache, full))
    assert 1e-7 < cache.figures["mean_kl"] < 0.01
    assert 0.9 < cache.figures["top1_agreement"] < 1.0
    # Against PyTorch there is nothing else that differs.
    assert full.figures["mean_kl"] == pytest.approx(cache.figures["mean_kl"], rel=0.01)
    assert bundle.manifest.golden[0].near_tie == 0.25
    found, before = plan(bundle, 3, 200), plan(floats, 3, 200)
    assert 4 * found.cache == before.cache
    # Activations are as wide as ever; the file of the graph is a little larger.
    assert found.working == pytest.approx(before.working, rel=0.01)
    with load(bundle.folder, max_batch=2) as model, load(floats.folder, max_batch=2) as other:
        prompts = [list(range(5, 60)), [7, 8, 9]]
        tokens = [
            [completion.tokens for completion in one.generate(prompts, Sampling(20, ignore_eos=True))]
            for one in (model, other)
        ]
        # A cache that was shared, grown and cut goes on as one that was not.
        (again,) = model.generate([*prompts[0], *tokens[0][0][:10]], Sampling(10, ignore_eos=True))
        assert again.stats.reused_tokens > 50
        assert again.tokens == tokens[0][0][10:]
        assert [len(row) for row in tokens[0]] == [20, 20]
        assert np.mean(np.array(tokens[0]) == np.array(tokens[1])) > 0.5


@pytest.mark.parametrize(
    "model_type",
    ["llama", pytest.param("cohere", marks=pytest.mark.medium), pytest.param("gpt_neox", marks=pytest.mark.medium)],
)
def test_keys_are_not_cut_off_wherever_they_stand(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rotations move what one channel holds to another with the position: in halves, in pairs, of a part of them."""
    monkeypatch.setattr(int8_cache, "WINDOW", 8)
    bundle = exported(make_model(tmp_path / "model", model_type), tmp_path)
    decoder = Decoder(OnnxRuntimeSession(bundle.file("decoder.onnx"), "cpu", 1), bundle.manifest.text)
    cache = decoder.new_cache()
    # The tokens of the first layer were all seen by the calibration, at the first eight positions.
    text = np.random.default_rng(0).integers(0, 320, 250).tolist()
    decoder.prefill(cache, 0, text)
    keys = cache.view(0, 1)[0]["past_key_values.0.key"].array[0, :, : len(text)]
    reach = 127 / int8_cache.HEADROOM
    assert 0.6 * reach < np.abs(keys.astype(int)).max() <= np.ceil(reach)


@pytest.mark.parametrize("model_type", ["gemma3n_text", "deepseek_v3", "lfm2"])
@pytest.mark.medium
def test_layers_that_share_a_cache_fill_up_heads_or_keep_a_state(model_type: str, tmp_path: Path) -> None:
    write_random_model(tiny_config(model_type), tmp_path / "model", seed=0)
    bundle = exported(tmp_path / "model", tmp_path, force=True)
    assert all(cache.quantization == "int8" for cache in bundle.manifest.text.caches)
    (evidence,) = bundle.manifest.evidence
    assert evidence.passed
    assert evidence.figures["mean_kl"] < 0.005
    model = ir.load(bundle.file("decoder.onnx"))
    nodes = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    assert nodes
    assert all(node.attributes.get_string("k_quant_type") == "PER_CHANNEL" for node in nodes)


@pytest.mark.medium
def test_a_model_without_the_operator_is_refused(tmp_path: Path) -> None:
    write_random_model(tiny_config("mamba"), tmp_path / "model", seed=0)
    with pytest.raises(ExportError, match="this model has none: its layers keep recurrent states"):
        exported(tmp_path / "model", tmp_path)
    assert not (tmp_path / "int8").exists()


def test_what_cannot_be_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with pytest.raises(ExportError, match=r"target cuda takes no --cache int8: .* none has run on a GPU"):
        exported(folder, tmp_path, target="cuda")
    with pytest.raises(ExportError, match="--layout genai shares its graph's cache"):
        exported(folder, tmp_path, layout="genai")
    with pytest.raises(ExportError, match="--cache is 'int3'; it must be one of float, int8"):
        exported(folder, tmp_path, cache="int3")
    assert not (tmp_path / "int8").exists()
