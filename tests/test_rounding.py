"""Rounding in blocks: what is searched is never worse than what is plain, and the operators read what was written."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from fmedge_converters.rounding import RoundedBlocks, Rounding, round_blocks
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

SHAPES = {
    "rows": st.integers(1, 9),
    "size": st.integers(1, 200),
    "bits": st.sampled_from([2, 4, 8]),
    "block": st.sampled_from([16, 32, 128]),
    "symmetric": st.booleans(),
    "spread": st.floats(1e-6, 1e4),
    "seed": st.integers(0, 99),
}


def matrix(rows: int, size: int, spread: float, seed: int) -> torch.Tensor:
    """Rows [n, K] with tails, as trained weights have them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, size, generator=generator) ** 3 * spread


def errors(rows: torch.Tensor, made: RoundedBlocks, importance: torch.Tensor | None, block: int) -> torch.Tensor:
    """Weighted squared error of each block, in float64."""
    weights = torch.ones(rows.shape[1]) if importance is None else importance
    return in_blocks((rows.double() - made.dequantized(rows.shape[1]).double()) ** 2 * weights.double(), block)


def misdirections(rows: torch.Tensor, made: RoundedBlocks, importance: torch.Tensor | None, block: int) -> torch.Tensor:
    """The same, where each block is scaled to be least."""
    weights = (torch.ones(rows.shape[1]) if importance is None else importance).double()
    given, found = rows.double(), made.dequantized(rows.shape[1]).double()
    whole, both, square = (in_blocks(item * weights, block) for item in (given * given, given * found, found * found))
    return whole - torch.where(square == 0, 0.0, both * both / square)


def in_blocks(items: torch.Tensor, block: int) -> torch.Tensor:
    return torch.nn.functional.pad(items, (0, -items.shape[1] % block)).unflatten(1, (-1, block)).sum(-1)


@settings(deadline=None, max_examples=40)
@given(**SHAPES)
def test_plain_rounding_is_off_by_half_a_step_at_most(
    rows: int, size: int, bits: int, block: int, symmetric: bool, spread: float, seed: int
) -> None:
    weights = matrix(rows, size, spread, seed)
    made = round_blocks(weights, Rounding(bits, block, symmetric, search=False))
    blocks = -(-size // block)
    assert made.codes.shape == (rows, blocks, block)
    assert made.scales.shape == (rows, blocks)
    steps = made.scales.abs().repeat_interleave(block, 1)[:, :size]
    off = (made.dequantized(size) - weights).abs()
    if symmetric:
        # At the far end of the other sign the range is one step short.
        inner = weights.abs() < steps * ((1 << (bits - 1)) - 1)
        assert (off <= steps * 1.0001).all()
        assert (off[inner] <= steps[inner] * 0.5001).all()
        peak = weights.abs().argmax(1, keepdim=True)
        assert torch.allclose(made.dequantized(size).gather(1, peak), weights.gather(1, peak), rtol=1e-5)
    else:
        # The zero point is rounded too: half a step more at the ends.
        assert (off <= steps * 1.0001).all()


@settings(deadline=None, max_examples=60)
@given(**SHAPES, weighted=st.booleans())
def test_searched_rounding_is_never_worse_than_plain(
    rows: int, size: int, bits: int, block: int, symmetric: bool, spread: float, seed: int, weighted: bool
) -> None:
    weights = matrix(rows, size, spread, seed)
    importance = torch.rand(size, generator=torch.Generator().manual_seed(seed)) + 0.05 if weighted else None
    plain = round_blocks(weights, Rounding(bits, block, symmetric, search=False), importance)
    searched = round_blocks(weights, Rounding(bits, block, symmetric), importance)
    before, after = (misdirections(weights, made, importance, block) for made in (plain, searched))
    whole = in_blocks(weights.double() ** 2 * (1.0 if importance is None else importance.double()), block)
    assert (after <= before + 1e-5 * whole).all()


def test_searched_rounding_gains_and_importance_moves_the_error() -> None:
    weights = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    importance = torch.ones(256)
    importance[::8] = 100.0
    plain, searched, steered = (
        round_blocks(weights, Rounding(4, 64, search=search), matters)
        for search, matters in ((False, None), (True, None), (True, importance))
    )
    total = [float(errors(weights, made, None, 64).sum()) for made in (plain, searched, steered)]
    assert total[1] < 0.9 * total[0]
    # Least squares alone would take 1 % of its length.
    along = float((searched.dequantized(256) * weights).sum() / weights.square().sum())
    assert 0.995 < along < 1.005
    weighted = [float(errors(weights, made, importance, 64).sum()) for made in (searched, steered)]
    assert weighted[1] < 0.7 * weighted[0]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_codes_can_say_is_said_exactly(bits: int, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    top = (1 << bits) - 1
    codes = torch.randint(0, top + 1, (6, 4, 32), generator=generator)
    codes[..., 0], codes[..., 1] = 0, top  # a block that uses its whole range
    zeros = torch.randint(0, top + 1, (6, 4, 1), generator=generator)
    if symmetric:
        zeros = torch.full_like(zeros, 1 << (bits - 1))
    scales = torch.rand(6, 4, 1, generator=generator) + 0.1
    weights = ((codes - zeros) * scales).flatten(1)
    made = round_blocks(weights, Rounding(bits, 32, symmetric))
    assert torch.allclose(made.dequantized(128), weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_and_single_weights(symmetric: bool) -> None:
    for search in (True, False):
        rounding = Rounding(4, 32, symmetric, search)
        assert (round_blocks(torch.zeros(2, 40), rounding).dequantized(40) == 0).all()
        for value in (3.0, -2.0, 1e-30):
            made = round_blocks(torch.tensor([[value]]), rounding, torch.tensor([0.0]))
            assert made.dequantized(1).item() == pytest.approx(value, rel=1e-5)
        made = round_blocks(torch.zeros(0, 40), rounding)
        assert made.codes.shape == (0, 2, 32)


def test_codes_fit_the_scales_as_they_are_stored() -> None:
    weights = matrix(8, 96, 1.0, 0)
    made = round_blocks(weights, Rounding(4, 32), None, torch.float16)
    assert torch.equal(made.scales, made.scales.half().float())
    nearest = (weights.unflatten(1, (3, 32)) / made.scales[..., None]).round().clamp(-8, 7) + 8
    assert torch.equal(made.codes.float(), nearest)


def test_importance_that_is_nowhere_counts_as_even() -> None:
    weights = matrix(4, 64, 1.0, 0)
    for rounding in (Rounding(4, 32), Rounding(4, 32, symmetric=False)):
        even = round_blocks(weights, rounding, torch.zeros(64))
        assert torch.equal(even.codes, round_blocks(weights, rounding, torch.full((64,), 7.0)).codes)


@pytest.mark.parametrize("accuracy_level", [0, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "block", "size"), [(4, 16, 48), (4, 64, 96), (8, 32, 96), (2, 32, 128)])
def test_the_operators_compute_with_the_restored_weights(
    bits: int, block: int, size: int, symmetric: bool, accuracy_level: int
) -> None:
    rows = 24
    weights = matrix(rows, size, 0.1, 0)
    made = round_blocks(weights, Rounding(bits, block, symmetric))
    codes, zeros = made.packed_codes().numpy(), made.packed_zero_points()
    arrays = {"codes": codes, "scales": made.scales.numpy(), "flat": codes.reshape(rows, -1)}
    if zeros is not None:
        arrays["zeros"] = zeros.numpy()
    more = ["zeros"] if zeros is not None else []
    attributes = {"bits": bits, "block_size": block}
    nodes = [
        helper.make_node("MatMulNBits", ["x", "codes", "scales", *more], ["y"], domain="com.microsoft",
                         K=size, N=rows, accuracy_level=accuracy_level, **attributes),
        helper.make_node("GatherBlockQuantized", ["flat", "ids", "scales", *more], ["rows"], domain="com.microsoft",
                         gather_axis=0, quantize_axis=1, **attributes),
    ]  # fmt: skip
    if bits == 2:
        nodes.pop()  # the lookup has 4 and 8 bits
    padded = made.scales.shape[1] * block
    outputs = [
        helper.make_tensor_value_info("y", TensorProto.FLOAT, [5, rows]),
        helper.make_tensor_value_info("rows", TensorProto.FLOAT, [3, padded]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, size]),
            helper.make_tensor_value_info("ids", TensorProto.INT64, [3]),
        ],
        outputs[: len(nodes)],
        [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x, ids = np.random.default_rng(0).standard_normal((5, size)).astype(np.float32), np.array([7, 0, 23])
    wanted = made.dequantized(size).numpy()
    y, *looked_up = session.run(None, {"x": x, "ids": ids})
    # Level 4 rounds the activations to 8 bits.
    off = 1e-4 if accuracy_level == 0 else 0.02
    np.testing.assert_allclose(y, x @ wanted.T, atol=off * np.abs(x @ wanted.T).max())
    for found in looked_up:
        np.testing.assert_allclose(found[:, :size], wanted[ids], atol=1e-6)
