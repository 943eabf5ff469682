"""DPM-Solver and DPM-Solver++, multistep: Lu et al. 2022, arXiv 2206.00927 and 2211.01095.

Values of the network at earlier levels stand in for the derivatives of the current one: dpm++2m is order 2.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import model_validator

from fmedge_runtimes.schedulers.diffusion_table import diffused
from fmedge_runtimes.schedulers.dpm_settings import DPMSettings
from fmedge_runtimes.schedulers.log_snr import clipped_timesteps, dpm_levels, log_snr, weights
from fmedge_runtimes.schedulers.scheduler import Array, Draw, Scalar, Step, combine
from fmedge_runtimes.schedulers.settings import Count, ZeroSnrSettings
from fmedge_runtimes.schedulers.step_options import StepOptions
from fmedge_runtimes.schedulers.timesteps import Spacing, check_in_table, spaced_between

_FEW = 15  # below so many steps the last ones are of lower order, for stability


class DPMMultistepSettings(ZeroSnrSettings, DPMSettings):
    """DPMSolverMultistepScheduler's fields."""

    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    lower_order_final: bool = True
    euler_at_final: bool = False
    use_lu_lambdas: bool = False
    timestep_spacing: Spacing = "linspace"
    steps_offset: Count = 0

    @model_validator(mode="after")
    def _lambdas_alone(self) -> DPMMultistepSettings:
        if self.use_lu_lambdas and (self.respaced or self.use_flow_sigmas):
            raise ValueError(
                "use_lu_lambdas goes without use_karras_sigmas, use_exponential_sigmas and use_flow_sigmas"
            )
        return self


class DPMMultistep:
    """Draws at every step if algorithm_type is an sde one."""

    init_noise_sigma = 1.0

    def __init__(self, settings: DPMMultistepSettings, table: Array, options: StepOptions) -> None:
        """Take the table of cumulated alphas [T], which has no zero."""
        every, sigmas = _levels(settings, table, options)
        self._count = len(every)
        first = options.first_step()
        self.timesteps = every[first:]  # [N]
        self._levels = log_snr(sigmas[first:], flow=settings.use_flow_sigmas)
        self._settings = settings
        self._solver, self._conversion = settings.solver, settings.conversion
        self._values: list[Array] = []

    def scale(self, sample: Array, index: int) -> Array:
        """The sample itself."""
        return sample

    def step(self, output: Array, index: int, sample: Array, draw: Draw) -> Step:
        """Go to the next level."""
        output = self._settings.prediction_of(output, sample.shape[1])
        value = self._conversion.value(output, sample, self._levels, index)
        clean = self._conversion.clean(value, sample, self._levels, index)
        self._values = [value, *self._values[: self._settings.solver_order - 1]]
        order = self._order(index)
        update = weights(self._solver, self._levels, index, index + 1)
        terms: list[tuple[Scalar, Array]] = [(update.sample, sample)]
        if order == 1:
            terms += [(update.value, value)]
        elif order == 2:
            first = update.first_midpoint if self._settings.solver_type == "midpoint" else update.first
            slope = first / self._ratio(index, 1)
            terms += [(update.value + slope, value), (-slope, self._values[1])]
        else:
            near, far = self._ratio(index, 1), self._ratio(index, 2)
            part, curve = near / (near + far), update.second / (near + far)
            newer = (update.first * (1 + part) + curve) / near
            older = -(update.first * part + curve) / far
            terms += [(update.value + newer, value), (older - newer, self._values[1]), (-older, self._values[2])]
        if self._solver.stochastic:
            terms += [(update.noise, draw())]
        return Step(combine(*terms), clean)

    def _order(self, index: int) -> int:
        settings, left = self._settings, len(self.timesteps) - index
        if self._levels.log[index] == self._levels.log[index + 1]:
            return 1  # with sigma_min the last interval may be empty
        lower = settings.lower_order_final and self._count < _FEW
        if left == 1 and (settings.euler_at_final or lower or settings.final_sigmas_type == "zero"):
            return 1
        return min(settings.solver_order, len(self._values), 2 if left == 2 and lower else 3)

    def _ratio(self, index: int, back: int) -> np.float32:
        """The interval before `back` levels, in units of the interval ahead."""
        log = self._levels.log
        return np.float32((log[index - back + 1] - log[index - back]) / (log[index + 1] - log[index]))

    def add_noise(self, original: Array, noise: Array, index: int) -> Array:
        """The clean sample at level `index`."""
        return diffused(original, noise, self._levels.alpha[index], self._levels.sigma[index])


def _levels(settings: DPMMultistepSettings, table: Array, options: StepOptions) -> tuple[Array, Array]:
    train = settings.num_train_timesteps
    if options.timesteps is not None:
        options.check_length("timesteps", options.timesteps)
        timesteps = np.array(options.timesteps).astype(np.int64)
    else:
        last = train - clipped_timesteps(table, settings.lambda_min_clipped)
        timesteps = spaced_between(settings.timestep_spacing, train, last, options.steps, settings.steps_offset)
    check_in_table(timesteps, len(table))
    rounded = settings.beta_schedule != "squaredcos_cap_v2"
    return dpm_levels(settings, table, timesteps, options, lu=settings.use_lu_lambdas, rounded=rounded)
