"""Euler's method over the probability flow in sigma: Karras et al. 2022, arXiv 2206.00364, without churn."""

from __future__ import annotations

from typing import Literal

import numpy as np

from fmedge_runtimes.errors import RequestError
from fmedge_runtimes.schedulers.noise_schedule import linspace
from fmedge_runtimes.schedulers.prediction import clean_of_unscaled
from fmedge_runtimes.schedulers.scheduler import Array, Draw, Step, combine
from fmedge_runtimes.schedulers.settings import Count, SigmaSettings, ZeroSnrSettings
from fmedge_runtimes.schedulers.sigma_sampling import (
    Levels,
    initial_sigma,
    levels_at,
    respaced,
    scaled,
    slope_of,
    visited,
)
from fmedge_runtimes.schedulers.sigmas import sigma_table, timesteps_of
from fmedge_runtimes.schedulers.step_options import StepOptions
from fmedge_runtimes.schedulers.timesteps import Spacing


class EulerSettings(ZeroSnrSettings, SigmaSettings):
    """EulerDiscreteScheduler's fields."""

    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    prediction_type: Literal["epsilon", "sample", "original_sample", "v_prediction"] = "epsilon"
    interpolation_type: Literal["linear", "log_linear"] = "linear"
    timestep_spacing: Spacing = "linspace"
    timestep_type: Literal["discrete", "continuous"] = "discrete"
    steps_offset: Count = 0
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"


class Euler:
    """Deterministic."""

    def __init__(self, settings: EulerSettings, table: Array, options: StepOptions) -> None:
        """Take the table of cumulated alphas [T], which has no zero."""
        levels, last = _levels(settings, table, options)
        sigmas = np.append(levels.sigmas, last).astype(np.float32)
        timesteps = levels.timesteps.astype(np.float32)
        if settings.timestep_type == "continuous" and settings.prediction_type == "v_prediction":
            if options.timesteps is not None:
                raise RequestError("timesteps cannot be given where the config says timestep_type continuous.")
            timesteps = np.float32(0.25) * np.log(sigmas[:-1])
        first = options.first_step()
        self.timesteps = timesteps[first:]  # [N]
        self.init_noise_sigma = initial_sigma(sigmas, settings.timestep_spacing)
        self._sigmas = sigmas[first:]  # [N + 1]
        self._kind = settings.prediction_type

    def scale(self, sample: Array, index: int) -> Array:
        """The sample at standard deviation 1."""
        return scaled(sample, self._sigmas[index])

    def step(self, output: Array, index: int, sample: Array, draw: Draw) -> Step:
        """Go to the next level along the line from the sample to its clean form."""
        sigma, following = self._sigmas[index], self._sigmas[index + 1]
        clean = clean_of_unscaled(self._kind, output, sample, sigma)
        return Step(combine((1.0, sample), (following - sigma, slope_of(sample, clean, sigma))), clean)

    def add_noise(self, original: Array, noise: Array, index: int) -> Array:
        """The clean sample at level `index`."""
        return combine((1.0, original), (self._sigmas[index], noise))


def _levels(settings: EulerSettings, table: Array, options: StepOptions) -> tuple[Levels, np.float32]:
    """The levels at which the denoiser is evaluated, and the one at which the trajectory ends."""
    if options.sigmas is not None:
        if options.timesteps is not None:
            raise RequestError("give timesteps or sigmas, not both.")
        options.check_length("sigmas", options.sigmas, more=1)
        given = np.array(options.sigmas, np.float32)
        return Levels(timesteps_of(given[:-1], sigma_table(table)), given[:-1]), given[-1]
    timesteps = visited(settings.timestep_spacing, settings.num_train_timesteps, options, settings.steps_offset)
    levels = levels_at(timesteps, table)
    sigmas = sigma_table(table)
    if settings.interpolation_type == "log_linear":
        # One level more than timesteps, as in diffusers: the last step ends at the lowest level, whatever comes after.
        logs = linspace(float(np.log(sigmas[-1])), float(np.log(sigmas[0])), options.steps + 1)
        levels = Levels(timesteps, np.exp(logs))
    last = sigmas[0] if settings.final_sigmas_type == "sigma_min" else np.float32(0)
    return respaced(levels, settings, table, options), last
