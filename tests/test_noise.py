"""Noise in numpy against torch's CPU generator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fmedge_runtimes.errors import RequestError
from fmedge_runtimes.noise import TorchNoise, normal_rows
from hypothesis import given, settings
from hypothesis import strategies as st

# log and cos are other implementations than torch's; 1 bit of a value near 4.
BOUND = 5e-7

seeds = st.integers(-(2**63), 2**64 - 1)
# Below 16 values torch draws one by one; above, the last 16 anew unless 16 divides the count.
shapes = st.sampled_from(
    [(), (0,), (1,), (3,), (15,), (16,), (17,), (3, 5), (31,), (32,), (2, 3, 8), (4, 9, 7), (1000,)]
)


@settings(max_examples=60, deadline=None)
@given(seeds, st.lists(shapes, min_size=1, max_size=8))
def test_every_draw_of_a_generator_is_torchs(seed, drawn):
    noise, generator = TorchNoise(seed), torch.Generator().manual_seed(seed)
    for shape in drawn:
        expected = torch.randn(shape, generator=generator).numpy()
        found = noise.normal(shape)
        assert found.dtype == np.float32
        assert found.shape == expected.shape
        assert np.abs(found - expected).max(initial=0) <= BOUND


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**32, 2**63 + 5, 2**64 - 1, -1, -(2**63)])
def test_seeds_of_64_bits(seed):
    expected = torch.randn(64, generator=torch.Generator().manual_seed(seed)).numpy()
    assert np.abs(TorchNoise(seed).normal((64,)) - expected).max() <= BOUND


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_seeds_that_torch_refuses_are_refused(seed):
    with pytest.raises((RuntimeError, ValueError)):
        torch.Generator().manual_seed(seed)
    with pytest.raises(RequestError, match="more than 64 bits"):
        TorchNoise(seed)


@pytest.mark.parametrize("shape", [(4, 8, 8), (5, 5), (3,)])
def test_rows_are_independent_of_the_batch(shape):
    batch = normal_rows([TorchNoise(seed) for seed in (5, 6, 7)], shape)
    for row, seed in zip(batch, (5, 6, 7), strict=True):
        assert np.array_equal(row, TorchNoise(seed).normal(shape))


def test_half_precision_is_the_same_noise_rounded():
    generator = torch.Generator().manual_seed(9)
    expected = torch.randn((4, 16, 16), generator=generator, dtype=torch.float16).numpy()
    found = TorchNoise(9).normal((4, 16, 16)).astype(np.float16)
    # One unit in the last place where the float32 values straddle a rounding boundary.
    assert np.abs(found.astype(np.float32) - expected.astype(np.float32)).max() <= 2e-3
    assert (found == expected).mean() > 0.999


def test_a_large_draw_is_normal():
    values = TorchNoise(1).normal((512, 512))
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01
    assert np.isfinite(values).all()
