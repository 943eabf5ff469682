"""PNDM: Liu et al. 2022, arXiv 2202.09778: a linear multistep method over predicted noise, with one of two warm-ups.

With skip_prk_steps the second timestep is evaluated twice (Heun's method); else the first three steps are Runge and
Kutta's of fourth order, four evaluations each.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from fmedge_runtimes.errors import RequestError
from fmedge_runtimes.schedulers.diffusion_table import diffused
from fmedge_runtimes.schedulers.prediction import clean_of, noise_of
from fmedge_runtimes.schedulers.scheduler import Array, Draw, Step, combine
from fmedge_runtimes.schedulers.settings import BetaSettings, Count
from fmedge_runtimes.schedulers.step_options import StepOptions
from fmedge_runtimes.schedulers.timesteps import Spacing, check_in_table, spaced, whole

# Adams and Bashforth's weights of the last outputs, newest first.
_ADAMS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
_RUNGE_KUTTA = (1 / 6, 1 / 3, 1 / 3, 1 / 6)
_WARM_UP = 12  # evaluations of Runge and Kutta's three steps


class PNDMSettings(BetaSettings):
    """PNDMScheduler's fields."""

    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    skip_prk_steps: bool = False
    set_alpha_to_one: bool = False
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    timestep_spacing: Spacing = "leading"
    steps_offset: Count = 0


class PNDM:
    """One evaluation more than steps; with Runge and Kutta's warm-up nine more."""

    init_noise_sigma = 1.0

    def __init__(self, settings: PNDMSettings, table: Array, options: StepOptions) -> None:
        """Take the table of cumulated alphas [T]."""
        train, first = settings.num_train_timesteps, options.first_step()
        spacing = whole(spaced(settings.timestep_spacing, train, options.steps, settings.steps_offset))
        self._gap = train // options.steps
        if settings.skip_prk_steps:
            self._warm_up = 0
            every = np.concatenate([spacing[:2], spacing[1:]])
        else:
            if options.steps < 4 or first:
                raise RequestError(
                    "PNDM's warm-up by Runge and Kutta needs at least 4 steps and strength 1; "
                    "set skip_prk_steps in the config, or use another scheduler."
                )
            self._warm_up = _WARM_UP
            every = np.concatenate([_runge_kutta_timesteps(spacing, self._gap // 2), spacing[3:]])
        self.timesteps = every[first:]  # [N]
        check_in_table(self.timesteps, len(table))
        self._table = table
        self._last = np.float32(1) if settings.set_alpha_to_one else table[0]
        self._kind = settings.prediction_type
        self._outputs: list[Array] = []
        self._start: Array | None = None
        self._sum: Array | None = None

    def scale(self, sample: Array, index: int) -> Array:
        """The sample itself."""
        return sample

    def step(self, output: Array, index: int, sample: Array, draw: Draw) -> Step:
        """Go to the next timestep."""
        timestep = int(self.timesteps[index])
        alpha, sigma = self._levels(timestep)
        clean = clean_of(self._kind, output, sample, alpha, sigma)
        if index < self._warm_up:
            return Step(self._runge_kutta(output, index, timestep, sample), clean)
        return Step(self._multistep(output, index, timestep, sample), clean)

    def _runge_kutta(self, output: Array, index: int, timestep: int, sample: Array) -> Array:
        stage = index % 4
        if stage == 0:
            self._start, self._sum = sample, np.zeros_like(output)
            self._outputs.append(output)
        assert self._start is not None and self._sum is not None
        self._sum += output * np.float32(_RUNGE_KUTTA[stage])
        after = timestep - (0 if index % 2 else self._gap // 2)
        return self._move(self._start, int(self.timesteps[index - stage]), after, self._sum if stage == 3 else output)

    def _multistep(self, output: Array, index: int, timestep: int, sample: Array) -> Array:
        if index == 1 and not self._warm_up:
            # The second evaluation: the first step again, with the mean of both outputs.
            assert self._start is not None
            mean = combine((0.5, output), (0.5, self._outputs[-1]))
            return self._move(self._start, timestep + self._gap, timestep, mean)
        self._outputs = [*self._outputs[-3:], output]
        self._start = sample
        weights = _ADAMS[len(self._outputs) - 1]
        mixed = combine(*zip(weights, reversed(self._outputs), strict=True))
        return self._move(sample, timestep, timestep - self._gap, mixed)

    def _signal(self, timestep: int) -> np.float32:
        return np.float32(self._table[timestep] if timestep >= 0 else self._last)

    def _levels(self, timestep: int) -> tuple[np.float32, np.float32]:
        signal = self._signal(timestep)
        return np.sqrt(signal), np.sqrt(np.float32(1) - signal)

    def _move(self, sample: Array, timestep: int, after: int, output: Array) -> Array:
        """From one timestep to another along the predicted noise (eq. 11, in which nothing is divided by alpha)."""
        if timestep >= len(self._table):
            check_in_table(np.array([timestep]), len(self._table))
        alpha, sigma = self._levels(timestep)
        alpha_after, sigma_after = self._levels(after)
        noise = noise_of(self._kind, output, sample, alpha, sigma)
        difference = self._signal(timestep) - self._signal(after)
        below = alpha * (alpha * sigma_after + sigma * alpha_after)
        return combine((alpha_after / alpha, sample), (difference / below, noise))

    def add_noise(self, original: Array, noise: Array, index: int) -> Array:
        """The clean sample at timestep `index`."""
        return diffused(original, noise, *self._levels(int(self.timesteps[index])))


def _runge_kutta_timesteps(spacing: npt.NDArray[np.int64], half: int) -> npt.NDArray[np.int64]:
    """Where the three steps are evaluated: beginning, middle, middle, end, [12]."""
    begins = spacing[:3]
    middles, ends = spacing[1:4] + half, spacing[1:4]
    return np.stack([begins, middles, middles, ends], axis=1).reshape(-1)
