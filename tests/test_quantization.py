"""Rounding of weights, and that the operators read what was written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from fmedge_converters.export import export
from fmedge_converters.export_options import ExportOptions
from fmedge_converters.schemes.dynamic_int8 import quantize_rows
from fmedge_converters.schemes.weight_only import quantize_blocks
from fmedge_converters.weight import Weight, concatenated, transposed, weight_from_array
from hypothesis import given, settings
from hypothesis import strategies as st
from models import make_model
from onnx import TensorProto, helper


def restored(codes: np.ndarray, scales: np.ndarray, bits: int, size: int) -> np.ndarray:
    """Weights [n, K] from codes and scales, as the operators define them."""
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:-1], -1)
    values = (codes.astype(np.float32) - (1 << (bits - 1))) * scales[..., None]
    return values.reshape(len(values), -1)[:, :size]


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 9),
    size=st.integers(1, 200),
    bits=st.sampled_from([4, 8]),
    block=st.sampled_from([16, 32, 128]),
    spread=st.floats(1e-6, 1e4),
    seed=st.integers(0, 99),
)
def test_blocks_round_to_the_nearest_step(
    rows: int, size: int, bits: int, block: int, spread: float, seed: int
) -> None:
    weights = (np.random.default_rng(seed).standard_normal((rows, size)) * spread).astype(np.float32)
    codes, scales = quantize_blocks(weights, bits, block)
    blocks = -(-size // block)
    assert codes.shape == (rows, blocks, block * bits // 8)
    assert scales.shape == (rows, blocks)
    found = restored(codes, scales, bits, size)
    steps = np.repeat(np.abs(scales), block, axis=1)[:, :size]
    # Half a step, but for values at the far end of the other sign, where the range is one step short.
    assert (np.abs(found - weights) <= steps * 1.0001).all()
    inner = np.abs(weights) < np.abs(scales).repeat(block, axis=1)[:, :size] * ((1 << (bits - 1)) - 1)
    assert (np.abs(found - weights)[inner] <= steps[inner] * 0.5001).all()
    padded = np.pad(weights, ((0, 0), (0, blocks * block - size))).reshape(rows, blocks, block)
    peaks = np.take_along_axis(padded, np.abs(padded).argmax(-1, keepdims=True), -1)[..., 0]
    at_peak = np.take_along_axis(
        np.pad(found, ((0, 0), (0, blocks * block - size))).reshape(rows, blocks, block),
        np.abs(padded).argmax(-1, keepdims=True),
        -1,
    )[..., 0]
    np.testing.assert_allclose(at_peak, peaks, rtol=1e-6)


def test_zeros_stay_zeros() -> None:
    codes, scales = quantize_blocks(np.zeros((2, 32), np.float32), 4, 32)
    assert (restored(codes, scales, 4, 32) == 0).all()
    codes, scales = quantize_rows(np.zeros((2, 32), np.float32))
    assert (codes == 0).all()
    assert (scales == 0).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [64, 96])
def test_the_operators_compute_with_the_restored_weights(bits: int, size: int) -> None:
    import onnxruntime

    block, rows = 64, 24
    random = np.random.default_rng(0)
    weights = random.standard_normal((rows, size)).astype(np.float32)
    codes, scales = quantize_blocks(weights, bits, block)
    flat = codes.reshape(rows, -1)
    padded = scales.shape[1] * block
    nodes = [
        helper.make_node("MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft",
                         K=size, N=rows, bits=bits, block_size=block),
        helper.make_node("GatherBlockQuantized", ["flat", "ids", "scales"], ["rows"], domain="com.microsoft",
                         bits=bits, block_size=block, gather_axis=0, quantize_axis=1),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, size]),
            helper.make_tensor_value_info("ids", TensorProto.INT64, [3]),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, [5, rows]),
            helper.make_tensor_value_info("rows", TensorProto.FLOAT, [3, padded]),
        ],
        [onnx.numpy_helper.from_array(array, name) for name, array in
         (("codes", codes), ("scales", scales), ("flat", flat))],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x, ids = random.standard_normal((5, size)).astype(np.float32), np.array([7, 0, 23])
    y, looked_up = session.run(None, {"x": x, "ids": ids})
    wanted = restored(codes, scales, bits, size)
    np.testing.assert_allclose(y, x @ wanted.T, atol=1e-4)
    np.testing.assert_allclose(looked_up[:, :size], wanted[ids], atol=1e-6)


@settings(deadline=None, max_examples=50)
@given(sizes=st.lists(st.integers(1, 7), min_size=1, max_size=4), data=st.data())
def test_weights_read_what_the_arrays_hold(sizes: list[int], data: st.DataObject) -> None:
    arrays = [np.random.default_rng(index).standard_normal((size, 3)) for index, size in enumerate(sizes)]
    whole = np.concatenate(arrays)
    weight = concatenated([weight_from_array(array) for array in arrays])
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    if stop > start:
        assert np.array_equal(weight.read(start, stop), whole[start:stop])
    assert np.array_equal(transposed(weight).array(), whole.T)
    assert np.array_equal(np.concatenate(list(weight.blocks())), whole)


def test_blocks_of_a_weight_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fmedge_converters.weight.CHUNK_BYTES", 100)
    asked: list[int] = []

    def read(start: int, stop: int) -> np.ndarray:
        asked.append(stop - start)
        return np.zeros((stop - start, 10), np.float32)

    assert sum(len(block) for block in Weight((25, 10), np.dtype(np.float32), read).blocks()) == 25
    assert max(asked) * 40 <= 100


FUSED = {
    "none": {"MatMul": 9, "Split": 2},
    "int4": {"MatMulNBits": 9, "Split": 2, "GatherBlockQuantized": 1},
    "int8": {"DynamicQuantizeMatMul": 9, "Split": 2},
}


@pytest.mark.parametrize("scheme", FUSED)
def test_a_llama_layer_is_as_few_nodes_as_it_can_be(scheme: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    block = 32 if scheme == "int4" else None  # divides the sizes of the model: nothing to cut off again
    made = export(ExportOptions(str(folder), tmp_path / "bundle", quantize=scheme, block_size=block, verify="none"))
    graph = onnx.load(made.file("decoder.onnx"), load_external_data=False).graph
    counts: dict[str, int] = {}
    for node in graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    assert counts["GroupQueryAttention"] == 2
    assert counts["SimplifiedLayerNormalization"] == 1
    assert counts["SkipSimplifiedLayerNormalization"] == 4
    assert {name: counts.get(name) for name in FUSED[scheme]} == FUSED[scheme]
    # Rotation, masks, shapes: nothing of them is computed in a step.
    assert not set(counts) & {"Transpose", "Slice", "Concat", "Shape", "Cos", "Sin", "Neg", "Expand", "Where"}
    rotated = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    for node in rotated:
        assert {item.name: item.i for item in node.attribute}["do_rotary"] == 1
        assert list(node.input[1:3]) == ["", ""]  # q, k and v come packed
    assert "position_ids" not in {value.name for value in graph.input}
