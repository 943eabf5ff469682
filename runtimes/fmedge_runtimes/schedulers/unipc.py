"""UniPC: Zhao et al. 2023, arXiv 2302.04867: a predictor, and a corrector that uses the value it needs anyway.

Before a step the sample is corrected with the value of the network at that very level; the next one is then predicted.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import BeforeValidator, model_validator

from fmedge_runtimes.errors import RequestError
from fmedge_runtimes.schedulers.diffusion_table import diffused
from fmedge_runtimes.schedulers.log_snr import Conversion, log_snr
from fmedge_runtimes.schedulers.prediction import limiter
from fmedge_runtimes.schedulers.scheduler import Array, Draw, Numbers, Scalar, Step, combine
from fmedge_runtimes.schedulers.settings import (
    Count,
    Order,
    ShiftSettings,
    SigmaSettings,
    Terminal,
    ThresholdSettings,
    ZeroSnrSettings,
)
from fmedge_runtimes.schedulers.sigma_sampling import spread
from fmedge_runtimes.schedulers.sigmas import shifted, shifted_by_size, sigma_table, stretched, timesteps_of
from fmedge_runtimes.schedulers.step_options import StepOptions
from fmedge_runtimes.schedulers.timesteps import Spacing, check_in_table, spaced_between

_ONE = np.float32(1)
_CLOSE = 1e-6  # a first level of 1 is noise alone; it is moved by so much


def _own_solver(value: object) -> object:
    return "bh2" if value in ("midpoint", "heun", "logrho") else value


class UniPCSettings(ZeroSnrSettings, ThresholdSettings, SigmaSettings, ShiftSettings):
    """UniPCMultistepScheduler's fields; a separate predictor (solver_p) is not supported."""

    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    solver_order: Order = 2
    prediction_type: Literal["epsilon", "sample", "v_prediction", "flow_prediction"] = "epsilon"
    predict_x0: bool = True
    solver_type: Annotated[Literal["bh1", "bh2"], BeforeValidator(_own_solver)] = "bh2"
    lower_order_final: bool = True
    disable_corrector: tuple[Count, ...] = ()
    solver_p: None = None
    timestep_spacing: Spacing = "linspace"
    steps_offset: Count = 0
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    time_shift_type: Literal["exponential", "linear"] = "exponential"
    shift_terminal: Terminal | None = None

    @model_validator(mode="after")
    def _consistent(self) -> UniPCSettings:
        if not self.predict_x0 and self.final_sigmas_type == "zero":
            raise ValueError("predict_x0 false needs final_sigmas_type sigma_min")
        if not self.predict_x0 and self.prediction_type == "flow_prediction":
            raise ValueError("prediction_type flow_prediction needs predict_x0 true")
        if not self.lower_order_final and self.final_sigmas_type == "zero" and self.solver_order > 1:
            raise ValueError("lower_order_final false needs final_sigmas_type sigma_min")
        if self.shift_terminal is not None and not self.use_flow_sigmas:
            raise ValueError("shift_terminal needs use_flow_sigmas")
        if self.use_flow_sigmas and self.use_exponential_sigmas:
            raise ValueError("use_flow_sigmas goes without use_exponential_sigmas")
        return self


class UniPC:
    """Deterministic."""

    init_noise_sigma = 1.0

    def __init__(self, settings: UniPCSettings, table: Array, options: StepOptions) -> None:
        """Take the table of cumulated alphas [T], which has no zero."""
        timesteps, sigmas = _levels(settings, table, options)
        self._first = options.first_step()
        self.timesteps = timesteps.astype(np.int64)[self._first :]  # [N]
        self._levels = log_snr(sigmas.astype(np.float32)[self._first :], flow=settings.use_flow_sigmas)
        limit = (
            limiter(clip=None, threshold=settings.threshold) if settings.thresholding and settings.predict_x0 else None
        )
        self._conversion = Conversion(settings.prediction_type, settings.predict_x0, limit)
        self._settings = settings
        self._values: list[Array] = []
        self._start: Array | None = None
        self._order = 0

    def scale(self, sample: Array, index: int) -> Array:
        """The sample itself."""
        return sample

    def step(self, output: Array, index: int, sample: Array, draw: Draw) -> Step:
        """Correct the sample, and go to the next level."""
        settings = self._settings
        value = self._conversion.value(output, sample, self._levels, index)
        clean = self._conversion.clean(value, sample, self._levels, index)
        if self._start is not None and index + self._first - 1 not in settings.disable_corrector:
            sample = self._moved(self._start, index, self._order, value)
        self._values = [value, *self._values[: settings.solver_order - 1]]
        left = len(self.timesteps) - index
        highest = min(settings.solver_order, left) if settings.lower_order_final else settings.solver_order
        self._order = min(highest, len(self._values))
        self._start = sample
        return Step(self._moved(sample, index + 1, self._order, None), clean)

    def _moved(self, start: Array, end: int, order: int, arrived: Array | None) -> Array:
        """From the level before `end` to it; `arrived` is the value at `end`, if it is known already."""
        levels, newest = self._levels, self._values[0]
        begin = end - 1
        h = levels.log[end] - levels.log[begin]
        if h == 0:
            return start.copy()  # with sigma_min the last interval may be empty
        hh = -h if self._settings.predict_x0 else h
        alpha, sigma = levels.alpha[end], levels.sigma[end]
        if self._settings.predict_x0:
            kept, scale = sigma / levels.sigma[begin], alpha
        else:
            kept, scale = alpha / levels.alpha[begin], sigma
        value = -scale * np.expm1(hh)
        terms: list[tuple[Scalar, Array]] = [(kept, start)]
        if order > 1 or arrived is not None:
            ratios = [(levels.log[begin - back] - levels.log[begin]) / h for back in range(1, order)]
            rhos, growth = self._differences(ratios, hh, corrected=arrived is not None)
            for back, (rho, ratio) in enumerate(zip(rhos, ratios, strict=False), start=1):
                part = scale * growth * rho / ratio
                value += part
                terms.append((-part, self._values[back]))
            if arrived is not None:
                part = scale * growth * rhos[-1]
                value += part
                terms.append((-part, arrived))
        return combine(*terms, (value, newest))

    def _differences(self, ratios: list[np.float32], hh: np.float32, *, corrected: bool) -> tuple[Array, np.float32]:
        """Weights of the differences to earlier values, and B(h): they match the integral's moments (section 3.1)."""
        grown = np.expm1(hh)
        growth = hh if self._settings.solver_type == "bh1" else grown
        order = len(ratios) + 1
        if order == (1 if corrected else 2):
            return np.array([0.5], np.float32), growth
        points = np.array([*ratios, _ONE], np.float32)
        moments, moment, factorial = [], grown / hh - _ONE, 1
        for power in range(1, order + 1):
            moments.append(moment * np.float32(factorial) / growth)
            factorial *= power + 1
            moment = moment / hh - np.float32(1 / factorial)
        matrix = points ** np.arange(order, dtype=np.float32)[:, None]  # [order, order]
        known = order if corrected else order - 1
        return np.linalg.solve(matrix[:known, :known], np.array(moments[:known], np.float32)), growth

    def add_noise(self, original: Array, noise: Array, index: int) -> Array:
        """The clean sample at level `index`."""
        return diffused(original, noise, self._levels.alpha[index], self._levels.sigma[index])


def _levels(settings: UniPCSettings, table: Array, options: StepOptions) -> tuple[Numbers, Numbers]:
    """Timesteps [N] and levels [N + 1], float64."""
    if options.sigmas is not None:
        options.check_length("sigmas", options.sigmas)
        if not settings.use_flow_sigmas or settings.respaced:
            raise RequestError(
                "sigmas can be given only where the config says use_flow_sigmas, without use_karras_sigmas."
            )
    dynamic = settings.use_flow_sigmas and settings.use_dynamic_shifting and not settings.respaced
    if dynamic and options.mu is None:
        raise RequestError("use_dynamic_shifting needs mu, which depends on the image's size; give mu.")
    if options.mu is not None and not dynamic:
        raise RequestError("mu has an effect only where the config says use_dynamic_shifting; leave it out.")
    train = settings.num_train_timesteps
    sigmas = sigma_table(table)
    if settings.respaced:
        levels = spread(sigmas[-1], sigmas[0], settings, options.steps)
        timesteps = timesteps_of(levels, sigmas)
        if settings.use_karras_sigmas:
            timesteps = np.round(timesteps)
        if settings.use_flow_sigmas:
            levels = levels / (levels + 1)
            timesteps = levels * train
        return timesteps, np.append(levels, levels[-1] if settings.final_sigmas_type == "sigma_min" else 0)
    if settings.use_flow_sigmas:
        levels = _flow_levels(settings, options)
        return levels * train, np.append(levels, levels[-1] if settings.final_sigmas_type == "sigma_min" else 0)
    spacing = spaced_between(settings.timestep_spacing, train, train, options.steps, settings.steps_offset)
    check_in_table(spacing, len(table))
    levels = np.interp(spacing, np.arange(len(sigmas)), sigmas)
    return spacing, np.append(levels, sigmas[0] if settings.final_sigmas_type == "sigma_min" else 0)


def _flow_levels(settings: UniPCSettings, options: StepOptions) -> Numbers:
    train = settings.num_train_timesteps
    levels: Numbers = np.linspace(1, 1 / train, options.steps + 1)[:-1]
    if options.sigmas is not None:
        levels = np.array(options.sigmas, np.float64)
    if options.mu is not None:
        levels = shifted_by_size(levels, options.mu, settings.time_shift_type)
    else:
        levels = shifted(levels, settings.flow_shift)
    if settings.shift_terminal:
        levels = stretched(levels, settings.shift_terminal)
    if abs(levels[0] - 1) < _CLOSE:
        levels[0] -= _CLOSE
    return levels
