"""GPTQ, AWQ and smoothing on matrices, against straightforward forms and against plain rounding."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from fmedge_converters.calibration.awq import rounded_with, searched_scales
from fmedge_converters.calibration.fitted import FittedMatrices
from fmedge_converters.calibration.gptq import DAMPING, compensated_blocks, fitted_scales, output_error
from fmedge_converters.calibration.linear_inputs import LinearInputs, Place
from fmedge_converters.calibration.smooth_quant import rounding_noise, smoothing_factors
from fmedge_converters.rounding import RoundedBlocks, Rounding, round_blocks
from fmedge_converters.weight import weight_from_array
from fmedge_runtimes.errors import SourceError

FLOAT = np.dtype(np.float32)


def problem(rows: int, size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix [N, K], and the Gram matrix [K, K] of inputs whose features depend on each other."""
    random = torch.Generator().manual_seed(seed)
    mixed = 0.2 * torch.randn(size, size, generator=random) + torch.diag(torch.randn(size, generator=random).exp())
    x = torch.randn(4 * size, size, generator=random) @ mixed
    return torch.randn(rows, size, generator=random), x.T @ x / len(x)


def reference_codes(matrix: torch.Tensor, gram: torch.Tensor, grid: RoundedBlocks, block: int) -> torch.Tensor:
    """The paper's update as it stands, with the inverse itself, one column after the other, in float64."""
    left, gram = matrix.double().clone(), gram.double()
    zeros = torch.full_like(grid.scales, 1 << (grid.bits - 1)) if grid.zero_points is None else grid.zero_points
    inverse = torch.linalg.inv(gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64))
    codes = torch.zeros(matrix.shape, dtype=torch.uint8)
    for column in torch.argsort(gram.diagonal(), descending=True).tolist():
        scale, zero = grid.scales[:, column // block].double(), zeros[:, column // block].double()
        found = (left[:, column] / scale + zero).round().clamp(0, 2**grid.bits - 1)
        codes[:, column] = found.to(torch.uint8)
        error = (left[:, column] - (found - zero) * scale) / inverse[column, column]
        left -= torch.outer(error, inverse[column])
        inverse -= torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        inverse[column, column] = 1  # done with
    return codes


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("size", "block"), [(96, 32), (300, 128)])  # more than one lazy block, and a block in part
def test_codes_are_those_of_the_paper(size: int, block: int, symmetric: bool) -> None:
    matrix, gram = problem(24, size)
    rounding = Rounding(4, block, symmetric)
    found = compensated_blocks(matrix, gram, rounding)
    wanted = reference_codes(matrix, gram, round_blocks(matrix, rounding, gram.diagonal()), block)
    ours = found.codes.flatten(1)[:, :size]
    # Where a weight lies between two codes, fp32 may take the other one, and what follows in its row differs.
    rows = (ours != wanted).any(1)
    assert rows.float().mean() < 0.2


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_compensation_lowers_the_error_of_the_product(bits: int) -> None:
    matrix, gram = problem(64, 256)
    rounding = Rounding(bits, 64)
    plain = round_blocks(matrix, replace(rounding, search=False)).dequantized(256)
    weighted = round_blocks(matrix, rounding, gram.diagonal()).dequantized(256)
    found = compensated_blocks(matrix, gram, rounding).dequantized(256)
    assert output_error(matrix, found, gram) < 0.65 * output_error(matrix, weighted, gram)
    assert output_error(matrix, found, gram) < 0.5 * output_error(matrix, plain, gram)


def test_fitted_scales_are_positive_where_the_operator_asks_for_it() -> None:
    matrix, gram = problem(64, 256)
    matrix[5, 64:128] = 0  # a block that says nothing of its scale
    matrix[7] *= 1e-9  # too small for a scale in fp16
    rounding = Rounding(4, 64, positive=True)
    signed = compensated_blocks(matrix, gram, replace(rounding, positive=False), torch.float16)
    found = compensated_blocks(matrix, gram, rounding, torch.float16)
    assert (signed.scales <= 0).any()
    assert (found.scales > 0).all() and torch.equal(found.scales, found.scales.half().float())
    plain = round_blocks(matrix, replace(rounding, search=False)).dequantized(256)
    assert output_error(matrix, found.dequantized(256), gram) < 0.5 * output_error(matrix, plain, gram)
    whole = compensated_blocks(matrix, gram, Rounding(8, 0, positive=True), torch.float16)
    assert whole.scales.shape == (64, 1)
    assert output_error(matrix, whole.dequantized(256), gram) < 0.01 * output_error(matrix, plain, gram)


def test_scales_are_best_for_their_codes() -> None:
    """No change of any scale lowers the error, with the damping that the fit has."""
    matrix, gram = problem(8, 96)
    rounded = round_blocks(matrix, Rounding(4, 32))
    damped = gram + DAMPING * gram.diagonal().mean() * torch.eye(96)
    best = replace(rounded, scales=fitted_scales(matrix, gram, rounded))
    least = output_error(matrix, best.dequantized(96), damped)
    assert least < output_error(matrix, rounded.dequantized(96), damped)
    for row, block, factor in ((0, 0, 1.01), (3, 1, 0.99), (7, 2, 1.01)):
        scales = best.scales.clone()
        scales[row, block] *= factor
        assert output_error(matrix, replace(best, scales=scales).dequantized(96), damped) > least


def test_inputs_that_say_little() -> None:
    matrix, gram = problem(8, 64)
    rounding = Rounding(4, 32)
    silent = compensated_blocks(matrix, torch.zeros_like(gram), rounding)
    assert output_error(matrix, silent.dequantized(64), torch.eye(64)) < 0.02 * float(matrix.square().sum())
    x = torch.zeros(3, 64)
    x[:, :5] = 1.0  # dead features, and less tokens than features
    few = compensated_blocks(matrix, x.T @ x, rounding)
    assert torch.isfinite(few.dequantized(64)).all()
    with pytest.raises(SourceError, match="not finite"):
        compensated_blocks(matrix, torch.full_like(gram, float("nan")), rounding)


def test_scales_of_features_that_matter() -> None:
    random = torch.Generator().manual_seed(0)
    matrix = torch.randn(64, 128, generator=random)
    magnitudes = torch.ones(128)
    magnitudes[[3, 50, 90]] = 30.0
    x = torch.randn(512, 128, generator=random) * magnitudes
    gram = x.T @ x / len(x)
    rounding = Rounding(4, 64)
    scales = searched_scales([matrix], x.square().mean(0), gram, [rounding])
    assert scales[[3, 50, 90]].min() > 1.5 * scales[[0, 1, 2]].max()
    none = rounded_with(matrix, torch.ones(128), gram, replace(rounding, search=False))
    found = rounded_with(matrix, scales, gram, rounding)
    assert output_error(matrix, found, gram) < 0.3 * output_error(matrix, none, gram)
    groups = torch.arange(128) % 64
    shared = searched_scales([matrix], x.square().mean(0), gram, [rounding], groups)
    assert torch.equal(shared[:64], shared[64:])


def test_smoothing_moves_the_difficulty_to_the_weights() -> None:
    inputs, weights = np.array([100.0, 1, 1, 4], np.float32), np.array([1.0, 1, 4, 1], np.float32)
    factors = smoothing_factors(inputs, weights)
    np.testing.assert_allclose(inputs / factors, weights * factors, rtol=1e-6)
    shared = smoothing_factors(inputs, weights, np.array([0, 1, 0, 1]))
    np.testing.assert_allclose(shared, np.sqrt([100 / 4, 4 / 1, 100 / 4, 4 / 1]), rtol=1e-6)
    assert (smoothing_factors(np.zeros(4, np.float32), weights) == 1).all()
    assert np.isfinite(smoothing_factors(np.array([1.0, 0, 0, 0], np.float32), weights)).all()


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True), (2, False)])
def test_what_is_kept_on_disk_is_what_was_rounded(bits: int, symmetric: bool, tmp_path: object) -> None:
    from pathlib import Path

    kept = FittedMatrices(Path(str(tmp_path)))
    places, wanted = [Place("stack", expert) for expert in range(3)], []
    for number, place in enumerate(places):
        matrix, _ = problem(6, 80, number)
        rounded = round_blocks(matrix, Rounding(bits, 32, symmetric), None, torch.bfloat16)
        kept.add(place, rounded, (6, 80))
        wanted.append(rounded.dequantized(80).numpy())
    stack = kept.stack(places, FLOAT)
    np.testing.assert_allclose(stack.array(), np.stack(wanted), rtol=1e-6)
    assert stack.packed is not None
    assert stack.packed.codes(4, 14).shape == (10, 3, 32 * bits // 8)
    assert stack.packed.scales(4, 14).itemsize == 2
    np.testing.assert_allclose(kept.weight(places[1], FLOAT).read(2, 5), wanted[1][2:5], rtol=1e-6)


def test_products_are_seen_in_every_form() -> None:
    random = torch.Generator().manual_seed(0)
    one, turned = torch.randn(4, 6, generator=random), torch.randn(6, 4, generator=random)
    stack = torch.randn(3, 4, 6, generator=random)
    x, y = torch.randn(5, 6, generator=random), torch.randn(2, 3, 6, generator=random)
    inputs = LinearInputs(with_gram=True)
    inputs.watch({"one": one, "turned": turned, "stack": stack})
    with inputs.mode(), torch.no_grad():
        torch.nn.functional.linear(x, one)
        torch.addmm(torch.zeros(4), x, turned)  # the same input
        torch.nn.functional.linear(x[:2], stack[1])
        y @ stack[2].T
        x @ torch.randn(6, 6)  # no parameter
    found = {place: one for one in inputs.taken() for place in one.matrices}
    assert set(found) == {Place("one"), Place("turned"), Place("stack", 1), Place("stack", 2)}
    assert found[Place("one")] is found[Place("turned")]
    assert [found[place].tokens for place in (Place("one"), Place("stack", 1), Place("stack", 2))] == [5, 2, 6]
    gram = found[Place("stack", 2)].gram
    assert gram is not None
    torch.testing.assert_close(gram, y.reshape(-1, 6).T @ y.reshape(-1, 6))
    matrix = found[Place("turned")].matrices[Place("turned")]
    assert matrix is not None
    matrix.zero_()
    assert not turned.any()  # a view of the parameter
    assert inputs.taken() == []


def test_the_noise_of_one_scale_is_what_rounding_adds() -> None:
    random = np.random.default_rng(0)
    matrix = random.standard_normal((48, 256)).astype(np.float32)
    x = random.standard_normal((512, 256)).astype(np.float32)
    x[3, 7] = 300.0
    step = np.abs(x).max() / 127
    product = x @ matrix.T
    found = (np.round(x / step) * step) @ matrix.T
    # Most numbers are less than a step here, where an error is no longer even within one: they are lost whole.
    noise = np.square(found - product).sum() / np.square(product).sum()
    told = rounding_noise(weight_from_array(matrix), float(np.abs(x).max()), np.square(x).mean(0))
    assert noise / 3 < told < 3 * noise
    x[3, 7] = 3.0
    step = np.abs(x).max() / 127
    noise = np.square((np.round(x / step) * step) @ matrix.T - x @ matrix.T).sum() / np.square(x @ matrix.T).sum()
    even = rounding_noise(weight_from_array(matrix), float(np.abs(x).max()), np.square(x).mean(0))
    assert even == pytest.approx(noise, rel=0.05)
    assert even < 1e-3 < told
    assert rounding_noise(weight_from_array(np.zeros_like(matrix)), 1.0, np.ones(256, np.float32)) == 0.0
