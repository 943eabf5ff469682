"""What Euler, Euler ancestral, Heun and LMS share: the levels of a trajectory in sigma.

Samples are clean + sigma * noise, scaled for the denoiser alone (Karras et al. 2022, arXiv 2206.00364). Where sigma is
large rounding counts, so the order of operations is diffusers'.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fmedge_runtimes.errors import RequestError
from fmedge_runtimes.schedulers.scheduler import Array, Numbers, Scalar
from fmedge_runtimes.schedulers.sigmas import Respacing, exponential, karras, sigma_table, timesteps_of
from fmedge_runtimes.schedulers.step_options import StepOptions
from fmedge_runtimes.schedulers.timesteps import Spacing, spaced, whole


@dataclass(frozen=True, slots=True)
class Levels:
    """Timesteps [N], which need not be whole numbers, and the noise levels at them [N], float64."""

    timesteps: Numbers
    sigmas: Numbers


def levels_at(timesteps: Numbers, table: Array) -> Levels:
    """The levels at timesteps, interpolated between those of the training timesteps."""
    sigmas = sigma_table(table)
    return Levels(timesteps, np.interp(timesteps, np.arange(len(sigmas)), sigmas))


def visited(spacing: Spacing, train: int, options: StepOptions, offset: int) -> Numbers:
    """The timesteps of the options, or spaced ones, as float32 numbers [N]."""
    if options.timesteps is not None:
        options.check_length("timesteps", options.timesteps)
        return np.array(options.timesteps, np.float32)
    timesteps = spaced(spacing, train, options.steps, offset)
    return (timesteps if spacing == "linspace" else whole(timesteps)).astype(np.float32)


def respaced(levels: Levels, settings: Respacing, table: Array, options: StepOptions) -> Levels:
    """The levels spaced anew between the first and the last of them, if the config says so.

    Raises RequestError when the caller gave timesteps of their own.
    """
    if not (settings.use_karras_sigmas or settings.use_exponential_sigmas):
        return levels
    if options.timesteps is not None:
        name = "use_karras_sigmas" if settings.use_karras_sigmas else "use_exponential_sigmas"
        raise RequestError(f"timesteps cannot be given where the config says {name}; leave one of them out.")
    sigmas = spread(levels.sigmas[0], levels.sigmas[-1], settings, options.steps)
    return Levels(timesteps_of(sigmas, sigma_table(table)), sigmas)


def spread(first: Scalar, last: Scalar, settings: Respacing, count: int) -> Numbers:
    """Levels between the config's sigma_max and sigma_min, or between `first` and `last`, float64 [count]."""
    high = settings.sigma_max if settings.sigma_max is not None else float(first)
    low = settings.sigma_min if settings.sigma_min is not None else float(last)
    return (karras if settings.use_karras_sigmas else exponential)(high, low, count)


def initial_sigma(sigmas: Array, spacing: Spacing) -> float:
    """The standard deviation of a trajectory's first sample: with leading spacing the signal's 1 is added."""
    top = sigmas.max()
    return float(top if spacing in ("linspace", "trailing") else np.sqrt(top * top + np.float32(1)))


def slope_of(sample: Array, clean: Array, sigma: np.float32) -> Array:
    """The derivative of the sample by sigma [B, ...]: away from the clean sample."""
    slope = sample - clean
    slope /= sigma
    return slope


def scaled(sample: Array, sigma: np.float32) -> Array:
    """The denoiser's input: a sample of standard deviation 1 [B, ...]."""
    unit: Array = sample / np.sqrt(sigma * sigma + np.float32(1))
    return unit
