"""Heun's method over the probability flow in sigma: Karras et al. 2022, arXiv 2206.00364, algorithm 1."""

from __future__ import annotations

from typing import Literal

import numpy as np

from fmedge_runtimes.schedulers.prediction import clean_of_unscaled, limiter
from fmedge_runtimes.schedulers.scheduler import Array, Draw, Step, combine
from fmedge_runtimes.schedulers.settings import Beta, BetaSettings, ClipSettings, Count, SigmaSettings
from fmedge_runtimes.schedulers.sigma_sampling import initial_sigma, levels_at, respaced, scaled, slope_of, visited
from fmedge_runtimes.schedulers.step_options import StepOptions
from fmedge_runtimes.schedulers.timesteps import Spacing


class HeunSettings(BetaSettings, ClipSettings, SigmaSettings):
    """HeunDiscreteScheduler's fields."""

    beta_start: Beta = 0.00085
    beta_end: Beta = 0.012
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "exp"] = "linear"
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    clip_sample: bool = False
    timestep_spacing: Spacing = "linspace"
    steps_offset: Count = 0


class Heun:
    """Two evaluations for each step but the last, which ends at zero and has one."""

    def __init__(self, settings: HeunSettings, table: Array, options: StepOptions) -> None:
        """Take the table of cumulated alphas [T]."""
        spacing = settings.timestep_spacing
        timesteps = visited(spacing, settings.num_train_timesteps, options, settings.steps_offset)
        levels = respaced(levels_at(timesteps, table), settings, table, options)
        sigmas = np.append(levels.sigmas, 0).astype(np.float32)
        first = 2 * options.first_step()
        self.timesteps = _doubled(levels.timesteps.astype(np.float32), end=0)[first:]  # [2 N - 1]
        self.init_noise_sigma = initial_sigma(sigmas, spacing)
        self._sigmas = _doubled(sigmas, end=1)[first:]  # [2 N]
        self._kind = settings.prediction_type
        self._limit = limiter(clip=settings.clip, threshold=None)
        self._begin: tuple[Array, Array] | None = None

    def scale(self, sample: Array, index: int) -> Array:
        """The sample at standard deviation 1."""
        return scaled(sample, self._sigmas[index])

    def step(self, output: Array, index: int, sample: Array, draw: Draw) -> Step:
        """Take Euler's step, or repeat it with the mean of the slopes at its two ends."""
        sigma = self._sigmas[index]
        clean = self._limit(clean_of_unscaled(self._kind, output, sample, sigma))
        slope = slope_of(sample, clean, sigma)
        if self._begin is None:
            self._begin = sample, slope
            return Step(combine((1.0, sample), (self._sigmas[index + 1] - sigma, slope)), clean)
        start, earlier = self._begin
        self._begin = None
        slope += earlier
        return Step(combine((1.0, start), ((sigma - self._sigmas[index - 1]) / 2, slope)), clean)

    def add_noise(self, original: Array, noise: Array, index: int) -> Array:
        """The clean sample at level `index`."""
        return combine((1.0, original), (self._sigmas[index], noise))


def _doubled(values: Array, end: int) -> Array:
    """Every value twice, but the first and the last `end`."""
    last = len(values) - end
    return np.concatenate([values[:1], np.repeat(values[1:last], 2), values[last:]])
