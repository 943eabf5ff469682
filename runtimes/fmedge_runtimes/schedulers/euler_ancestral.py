"""Euler's method with ancestral noise: each step goes below the next level, and noise brings it back up.

The split of a step into a deterministic and a random part is that of DDPM (Ho et al. 2020, arXiv 2006.11239) in the
variables of Karras et al. 2022, arXiv 2206.00364.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from fmedge_runtimes.schedulers.prediction import clean_of_unscaled
from fmedge_runtimes.schedulers.scheduler import Array, Draw, Step, combine
from fmedge_runtimes.schedulers.settings import Count, ZeroSnrSettings
from fmedge_runtimes.schedulers.sigma_sampling import initial_sigma, levels_at, scaled, slope_of, visited
from fmedge_runtimes.schedulers.step_options import StepOptions
from fmedge_runtimes.schedulers.timesteps import Spacing


class EulerAncestralSettings(ZeroSnrSettings):
    """EulerAncestralDiscreteScheduler's fields."""

    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    timestep_spacing: Spacing = "linspace"
    steps_offset: Count = 0


class EulerAncestral:
    """Draws at every step; the last draw is multiplied by zero."""

    def __init__(self, settings: EulerAncestralSettings, table: Array, options: StepOptions) -> None:
        """Take the table of cumulated alphas [T], which has no zero."""
        timesteps = visited(settings.timestep_spacing, settings.num_train_timesteps, options, settings.steps_offset)
        sigmas = np.append(levels_at(timesteps, table).sigmas, 0).astype(np.float32)
        first = options.first_step()
        self.timesteps = timesteps[first:]  # [N]
        self.init_noise_sigma = initial_sigma(sigmas, settings.timestep_spacing)
        self._sigmas = sigmas[first:]  # [N + 1]
        power = np.square(self._sigmas)
        self._up = np.sqrt(power[1:] * (power[:-1] - power[1:]) / power[:-1])  # [N]
        self._down = np.sqrt(np.maximum(power[1:] - np.square(self._up), 0))  # [N]
        self._kind = settings.prediction_type

    def scale(self, sample: Array, index: int) -> Array:
        """The sample at standard deviation 1."""
        return scaled(sample, self._sigmas[index])

    def step(self, output: Array, index: int, sample: Array, draw: Draw) -> Step:
        """Go to the next level."""
        sigma, down = self._sigmas[index], self._down[index]
        clean = clean_of_unscaled(self._kind, output, sample, sigma)
        following = combine((1.0, sample), (down - sigma, slope_of(sample, clean, sigma)))
        following += self._up[index] * draw()
        return Step(following, clean)

    def add_noise(self, original: Array, noise: Array, index: int) -> Array:
        """The clean sample at level `index`."""
        return combine((1.0, original), (self._sigmas[index], noise))
