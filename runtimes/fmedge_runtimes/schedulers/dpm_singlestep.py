"""DPM-Solver and DPM-Solver++, singlestep: Lu et al. 2022, arXiv 2206.00927 and 2211.01095.

Steps come in groups of up to three; each step of a group starts from the group's first sample, with one value more.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import model_validator

from fmedge_runtimes.schedulers.diffusion_table import diffused
from fmedge_runtimes.schedulers.dpm_settings import DPMSettings
from fmedge_runtimes.schedulers.log_snr import clipped_timesteps, dpm_levels, log_snr, weights
from fmedge_runtimes.schedulers.scheduler import Array, Draw, Scalar, Step, combine
from fmedge_runtimes.schedulers.settings import BetaSettings
from fmedge_runtimes.schedulers.step_options import StepOptions
from fmedge_runtimes.schedulers.timesteps import check_count, check_in_table


class DPMSinglestepSettings(BetaSettings, DPMSettings):
    """DPMSolverSinglestepScheduler's fields."""

    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    lower_order_final: bool = False

    @model_validator(mode="after")
    def _stable(self) -> DPMSinglestepSettings:
        if self.algorithm_type == "sde-dpmsolver":
            raise ValueError("algorithm_type must be dpmsolver++, dpmsolver or sde-dpmsolver++")
        if self.algorithm_type == "sde-dpmsolver++" and self.solver_order == 3 and self.solver_type == "heun":
            raise ValueError(
                "algorithm_type sde-dpmsolver++ of solver_order 3 needs solver_type midpoint: heun diverges"
            )
        return self


class DPMSinglestep:
    """Draws at every step if algorithm_type is sde-dpmsolver++."""

    init_noise_sigma = 1.0

    def __init__(self, settings: DPMSinglestepSettings, table: Array, options: StepOptions) -> None:
        """Take the table of cumulated alphas [T]."""
        every, sigmas = _levels(settings, table, options)
        first = options.first_step()
        self.timesteps = every[first:]  # [N]
        self._orders = orders(settings, options.steps)[first:]
        self._levels = log_snr(sigmas[first:], flow=settings.use_flow_sigmas)
        self._settings = settings
        self._solver, self._conversion = settings.solver, settings.conversion
        self._values: list[Array] = []
        self._start: Array | None = None

    def scale(self, sample: Array, index: int) -> Array:
        """The sample itself."""
        return sample

    def step(self, output: Array, index: int, sample: Array, draw: Draw) -> Step:
        """Go to the next level."""
        output = self._settings.prediction_of(output, sample.shape[1])
        value = self._conversion.value(output, sample, self._levels, index)
        clean = self._conversion.clean(value, sample, self._levels, index)
        self._values = [value, *self._values[: self._settings.solver_order - 1]]
        order = min(self._orders[index], len(self._values))
        if order == 1:
            self._start = sample
        assert self._start is not None
        terms = [*self._terms(index, order, self._start)]
        if self._solver.stochastic:
            terms += [(weights(self._solver, self._levels, index - order + 1, index + 1).noise, draw())]
        return Step(combine(*terms), clean)

    def _terms(self, index: int, order: int, start: Array) -> list[tuple[Scalar, Array]]:
        base = index - order + 1
        update = weights(self._solver, self._levels, base, index + 1)
        values = self._values
        terms: list[tuple[Scalar, Array]] = [(update.sample, start)]
        if order == 1:
            return [*terms, (update.value, values[0])]
        near = self._ratio(base, index, index)
        midpoint = self._settings.solver_type == "midpoint"
        if order == 2:
            slope = (update.first_midpoint if midpoint else update.first) / near
            return [*terms, (update.value - slope, values[1]), (slope, values[0])]
        if midpoint:
            slope = update.first / near
            return [*terms, (update.value - slope, values[2]), (slope, values[0])]
        # Newton's interpolation through the three values of the group.
        far = self._ratio(base, index - 1, index)
        span = near - far
        older = (update.first * near - 2 * update.second) / (span * far)
        newer = (2 * update.second - update.first * far) / (span * near)
        return [*terms, (update.value - older - newer, values[2]), (older, values[1]), (newer, values[0])]

    def _ratio(self, base: int, to: int, index: int) -> np.float32:
        """The interval from the group's first level to another, in units of the group's whole interval."""
        log = self._levels.log
        return np.float32((log[to] - log[base]) / (log[index + 1] - log[base]))

    def add_noise(self, original: Array, noise: Array, index: int) -> Array:
        """The clean sample at level `index`."""
        return diffused(original, noise, self._levels.alpha[index], self._levels.sigma[index])


def orders(settings: DPMSinglestepSettings, steps: int) -> tuple[int, ...]:
    """The order of each step: groups 1, 2, .. up to the solver's order, with lower ones at the end.

    Steps that do not fill whole groups, and a trajectory that ends at a clean sample, need lower orders at the end.
    """
    order = settings.solver_order
    lower = settings.lower_order_final or steps % order != 0 or settings.final_sigmas_type == "zero"
    found = [index % order + 1 for index in range(steps)]
    if lower and order > 1 and steps % order == 0:
        # The last group is split, so that the trajectory ends with a step of order 1.
        found[-order:] = [1, 2, 1] if order == 3 else [1, 1]
    if settings.final_sigmas_type == "zero":
        found[-1] = 1
    return tuple(found)


def _levels(settings: DPMSinglestepSettings, table: Array, options: StepOptions) -> tuple[Array, Array]:
    train = settings.num_train_timesteps
    if options.timesteps is not None:
        options.check_length("timesteps", options.timesteps)
        timesteps = np.array(options.timesteps).astype(np.int64)
    else:
        check_count(train, options.steps)
        last = train - 1 - clipped_timesteps(table, settings.lambda_min_clipped)
        timesteps = np.round(np.linspace(0, last, options.steps + 1)).astype(np.int64)[:0:-1]
    check_in_table(timesteps, len(table))
    return dpm_levels(settings, table, timesteps, options, lu=False, rounded=True)
