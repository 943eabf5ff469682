"""Weights are written block by block, and equal ones once."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from fmedge_converters import weight as weight_module
from fmedge_converters.graph import DecoderGraph
from fmedge_converters.rounding import Rounding, round_blocks
from fmedge_converters.schemes.weight_only import QuantizedMatrix, joined_blocks
from fmedge_converters.weight import Weight, concatenated, transposed, weight_from_array
from fmedge_converters.writer import WrittenGraph, write_graph
from fmedge_runtimes.bundle import sha256_of

ARRAY = np.random.default_rng(0).standard_normal((64, 96)).astype(np.float32)


def write(
    folder: Path, weights: dict[str, Weight]
) -> tuple[WrittenGraph, dict[str, np.ndarray], list[tuple[int, int]]]:
    """The written graph, what can be read from it, and the progress that was told."""
    graph = DecoderGraph(ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 21}), ir_version=10), {})
    graph.graph.outputs.extend(graph.add_weight(name, weight) for name, weight in weights.items())
    told: list[tuple[int, int]] = []
    written = write_graph(graph, folder, "graph", lambda done, total: told.append((done, total)))
    read = {item.name: onnx.numpy_helper.to_array(item) for item in onnx.load(written.graph).graph.initializer}
    return written, read, told


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_module, "CHUNK_BYTES", 10 * 96 * 4)


def test_equal_weights_share_their_bytes(tmp_path: Path) -> None:
    other = ARRAY.copy()
    other[-1, -1] += 1  # which begins like the first
    weights = {
        "one": weight_from_array(ARRAY),
        "same numbers": weight_from_array(ARRAY.copy()),
        "other": weight_from_array(other),
        "across": transposed(weight_from_array(ARRAY)),
        "small": weight_from_array(np.arange(3.0)),
    }
    written, read, told = write(tmp_path, weights)
    assert written.weight_bytes == written.data.stat().st_size == 3 * ARRAY.nbytes
    assert written.data_sha256 == sha256_of(written.data)
    for name, weight in weights.items():
        assert np.array_equal(read[name], weight.array()), name
    total = sum(weight.nbytes for weight in weights.values())
    assert [all_of_it for _, all_of_it in told] == [total] * len(told)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1][0] == 4 * ARRAY.nbytes


def test_a_matrix_is_quantized_once_for_its_codes_and_scales_under_two_shapes(tmp_path: Path) -> None:
    array = np.concatenate([ARRAY, -ARRAY])
    asked: list[tuple[int, int]] = []

    def read(start: int, stop: int) -> np.ndarray:
        asked.append((start, stop))
        return array[start:stop]

    rounding = Rounding(4, 16)
    matrix = QuantizedMatrix(Weight(array.shape, array.dtype, read), rounding)  # scales too large to stay in the graph
    codes = matrix.codes
    _, found, _ = write(tmp_path, {"codes": codes, "scales": matrix.scales, "rows": joined_blocks(codes)})
    made = round_blocks(torch.from_numpy(array), rounding, None, torch.bfloat16)
    wanted, scales = made.packed_codes().numpy(), made.scales.numpy()
    assert np.array_equal(found["codes"], wanted)
    assert np.array_equal(found["rows"], wanted.reshape(128, -1))
    assert np.array_equal(found["scales"].astype(np.float32), scales)
    assert sorted(asked) == [(start, min(start + 10, 128)) for start in range(0, 128, 10)]


def test_blocks_are_made_side_by_side_and_stay_in_order() -> None:
    together = threading.Barrier(2)  # no block is done before another one has begun

    def read(start: int, stop: int) -> np.ndarray:
        together.wait(timeout=10)
        return ARRAY[start:stop]

    weight = Weight((60, 96), ARRAY.dtype, read)
    assert np.array_equal(np.concatenate(list(weight.blocks(2))), ARRAY[:60])


def test_an_error_while_a_block_is_made_rises() -> None:
    def read(start: int, stop: int) -> np.ndarray:
        if start:
            raise ZeroDivisionError
        return ARRAY[start:stop]

    before = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        list(Weight(ARRAY.shape, ARRAY.dtype, read).blocks(2))
    assert threading.active_count() == before


def test_weights_whose_rows_cost_more_than_their_size_are_read_in_larger_blocks() -> None:
    asked: list[int] = []

    def read(start: int, stop: int) -> np.ndarray:
        asked.append(stop - start)
        return ARRAY[start:stop]

    costly = Weight(ARRAY.shape, ARRAY.dtype, read, step=48)
    for weight in (costly, concatenated([costly, costly]), replace(costly, step=48)):
        assert np.array_equal(np.concatenate(list(weight.blocks(2)))[:64], ARRAY)
    assert max(asked) == 48
    assert len(asked) <= 3 * 4
