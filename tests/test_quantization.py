"""Rounding of weights, and that the operators read what was written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from fmedge_converters.export import export
from fmedge_converters.export_options import ExportOptions
from fmedge_converters.schemes.dynamic_int8 import quantize_rows
from fmedge_converters.weight import Weight, concatenated, transposed, weight_from_array
from hypothesis import given, settings
from hypothesis import strategies as st
from models import make_model

pytestmark = pytest.mark.usefixtures("traced_once")


def test_zeros_stay_zeros() -> None:
    codes, scales = quantize_rows(np.zeros((2, 32), np.float32))
    assert (codes == 0).all()
    assert (scales == 0).all()


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
    "int8": {"MatMulNBits": 9, "Split": 2, "GatherBlockQuantized": 1},
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
