"""What the solvers in log-SNR share (DPM-Solver, UniPC): levels, their coefficients, and the weights of one update.

A level has alpha and sigma, a sample being alpha * clean + sigma * noise, and lambda = log(alpha / sigma). Over an
interval h of lambda the linear part of the equation is solved exactly; the network's part is an integral of exp(lambda)
and its moments give the weights (Lu et al. 2022, arXiv 2206.00927 for noise, 2211.01095 for the clean sample).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fmedge_runtimes.errors import RequestError
from fmedge_runtimes.schedulers.noise_schedule import BetaSchedule
from fmedge_runtimes.schedulers.prediction import Limit, between, clean_of, noise_of
from fmedge_runtimes.schedulers.scheduler import Array, Numbers
from fmedge_runtimes.schedulers.sigma_sampling import spread
from fmedge_runtimes.schedulers.sigmas import Respacing, shifted, sigma_table, timesteps_of
from fmedge_runtimes.schedulers.step_options import StepOptions

ONE = np.float32(1)


@dataclass(frozen=True, slots=True)
class LogSnr:
    """The levels of a trajectory and where it ends, float32 [N + 1]."""

    sigmas: Array
    """As the tables have them: relative to the signal, or of flow matching."""
    alpha: Array
    sigma: Array
    log: Array
    """lambda; infinite where sigma is 0."""


def log_snr(sigmas: Array, *, flow: bool) -> LogSnr:
    """The coefficients at noise levels [N + 1]."""
    alpha = np.asarray(ONE - sigmas if flow else ONE / np.sqrt(np.square(sigmas) + ONE), np.float32)
    sigma: Array = sigmas if flow else sigmas * alpha
    with np.errstate(divide="ignore"):
        return LogSnr(sigmas, alpha, sigma, np.log(alpha) - np.log(sigma))


@dataclass(frozen=True, slots=True)
class Solver:
    """Which equation is solved: over the clean sample or the noise, without or with noise of its own."""

    data: bool
    stochastic: bool


@dataclass(frozen=True, slots=True)
class Weights:
    """Of one update: of the sample, of the network's value and its first two differences, of fresh noise."""

    sample: np.float32
    value: np.float32
    first: np.float32
    first_midpoint: np.float32
    second: np.float32
    noise: np.float32


def weights(solver: Solver, levels: LogSnr, start: int, end: int) -> Weights:
    """Of an update between two levels.

    The second difference of the stochastic solver has the sign that diffusers gives it.
    """
    h = levels.log[end] - levels.log[start]
    z = (-h if solver.data else h) * np.float32(2 if solver.data and solver.stochastic else 1)
    alpha, sigma = levels.alpha[end], levels.sigma[end]
    scale = (alpha if solver.data else sigma) * np.float32(2 if solver.stochastic and not solver.data else 1)
    kept = sigma / levels.sigma[start] if solver.data else alpha / levels.alpha[start]
    phi = np.exp(z) - ONE
    noise = np.float32(0)
    if solver.stochastic:
        kept = kept * np.exp(-h) if solver.data else kept
        noise = sigma * np.sqrt(ONE - np.exp(-2 * h) if solver.data else np.exp(2 * h) - ONE)
    if h == 0 or not np.isfinite(h):  # no interval, or one to a clean sample: only an update of first order does that
        return Weights(kept, -scale * phi, np.float32(0), np.float32(0), np.float32(0), noise)
    half = np.float32(-0.5 if solver.stochastic else 0.5)
    return Weights(
        sample=kept,
        value=-scale * phi,
        first=-scale * (phi / z - ONE),
        first_midpoint=-scale * phi / 2,
        second=-scale * ((phi - z) / np.square(z) - half),
        noise=noise,
    )


@dataclass(frozen=True, slots=True)
class Conversion:
    """How the network's output becomes what the solver is about."""

    prediction: str
    data: bool
    limit: Limit | None
    """Bounds the clean sample; None leaves it as it is."""

    def value(self, output: Array, sample: Array, levels: LogSnr, index: int) -> Array:
        """The clean sample or the noise at a level, [B, ...]."""
        alpha, sigma = levels.alpha[index], levels.sigma[index]
        if self.data:
            return self._limited(self._clean(output, sample, levels, index))
        noise = noise_of(self.prediction, output, sample, alpha, sigma)
        if self.limit is None:
            return noise
        return between(sample, self.limit(clean_of("epsilon", noise, sample, alpha, sigma)), alpha, sigma)

    def clean(self, value: Array, sample: Array, levels: LogSnr, index: int) -> Array:
        """The clean sample [B, ...] that a value means."""
        return value if self.data else clean_of("epsilon", value, sample, levels.alpha[index], levels.sigma[index])

    def _clean(self, output: Array, sample: Array, levels: LogSnr, index: int) -> Array:
        if self.prediction == "flow_prediction":
            return clean_of("epsilon", output, sample, ONE, levels.sigmas[index])
        return clean_of(self.prediction, output, sample, levels.alpha[index], levels.sigma[index])

    def _limited(self, clean: Array) -> Array:
        return clean if self.limit is None else self.limit(clean)


class SolverSettings(Respacing, Protocol):
    """The fields of DPM-Solver's configs that decide about its levels."""

    @property
    def num_train_timesteps(self) -> int: ...
    @property
    def beta_schedule(self) -> BetaSchedule: ...
    @property
    def use_flow_sigmas(self) -> bool: ...
    @property
    def flow_shift(self) -> float: ...
    @property
    def use_dynamic_shifting(self) -> bool: ...
    @property
    def final_sigmas_type(self) -> str: ...


def clipped_timesteps(table: Array, least: float) -> int:
    """How many of the noisiest training timesteps have a lambda below `least`."""
    with np.errstate(divide="ignore"):
        logs = np.log(np.sqrt(table)) - np.log(np.sqrt(ONE - table))
    return int(np.searchsorted(logs[::-1], least))


def dpm_levels(
    settings: SolverSettings, table: Array, timesteps: Numbers, options: StepOptions, *, lu: bool, rounded: bool
) -> tuple[Numbers, Array]:
    """Timesteps int64 [N] and levels float32 [N + 1], from spaced timesteps and what the config says of the levels."""
    sigmas = sigma_table(table)
    last = sigmas[0] if settings.final_sigmas_type == "sigma_min" else np.float32(0)
    respaced = settings.use_karras_sigmas or settings.use_exponential_sigmas
    if options.timesteps is not None and (respaced or lu):
        raise RequestError("timesteps cannot be given where the config spaces the noise levels; leave one of them out.")
    if respaced:
        levels = spread(sigmas[-1], sigmas[0], settings, options.steps)
        timesteps = timesteps_of(levels, sigmas)
        timesteps = np.round(timesteps) if rounded and settings.use_karras_sigmas else timesteps
    elif lu:
        # Equally spaced in lambda (Lu et al. 2022, arXiv 2211.01095).
        logs = np.log(sigmas)
        levels = np.exp(np.linspace(float(logs[-1]), float(logs[0]), options.steps))
        timesteps = timesteps_of(levels, sigmas)
        timesteps = np.round(timesteps) if rounded else timesteps
    elif settings.use_flow_sigmas:
        train = settings.num_train_timesteps
        even = 1 - np.linspace(1, 1 / train, options.steps + 1)  # ascending from 0
        levels = shifted(even, _flow_shift(settings, options))[:0:-1]
        timesteps = levels * train
    else:
        levels = np.interp(timesteps, np.arange(len(sigmas)), sigmas)
    if options.mu is not None and not settings.use_flow_sigmas:
        raise RequestError("mu has an effect only where the config says use_flow_sigmas; leave it out.")
    return timesteps.astype(np.int64), np.append(levels, last).astype(np.float32)


def _flow_shift(settings: SolverSettings, options: StepOptions) -> float:
    if options.mu is None:
        return settings.flow_shift
    if not settings.use_dynamic_shifting:
        raise RequestError("mu has an effect only where the config says use_dynamic_shifting; leave it out.")
    return float(np.exp(options.mu))
