"""Linear multistep over the probability flow in sigma (K-LMS): Adams and Bashforth's method on uneven levels.

The formulation in sigma is that of Karras et al. 2022, arXiv 2206.00364. The integrals of the interpolating polynomials
are exact here; diffusers computes them numerically.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.polynomial import polynomial

from fmedge_runtimes.schedulers.prediction import clean_of_unscaled
from fmedge_runtimes.schedulers.scheduler import Array, Draw, Scalar, Step, combine
from fmedge_runtimes.schedulers.settings import BetaSettings, Count, SigmaSettings
from fmedge_runtimes.schedulers.sigma_sampling import initial_sigma, levels_at, respaced, scaled, slope_of, visited
from fmedge_runtimes.schedulers.step_options import StepOptions
from fmedge_runtimes.schedulers.timesteps import Spacing

_ORDER = 4


class LMSSettings(BetaSettings, SigmaSettings):
    """LMSDiscreteScheduler's fields; sigma_min and sigma_max apply to use_exponential_sigmas alone, as in diffusers."""

    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    timestep_spacing: Spacing = "linspace"
    steps_offset: Count = 0


class LMS:
    """Deterministic. A trajectory that starts in the middle starts at order 1."""

    def __init__(self, settings: LMSSettings, table: Array, options: StepOptions) -> None:
        """Take the table of cumulated alphas [T]."""
        spacing = settings.timestep_spacing
        if settings.use_karras_sigmas:
            settings = settings.model_copy(update={"sigma_min": None, "sigma_max": None})
        timesteps = visited(spacing, settings.num_train_timesteps, options, settings.steps_offset)
        levels = respaced(levels_at(timesteps, table), settings, table, options)
        sigmas = np.append(levels.sigmas, 0).astype(np.float32)
        first = options.first_step()
        self.timesteps = levels.timesteps.astype(np.float32)[first:]  # [N]
        self.init_noise_sigma = initial_sigma(sigmas, spacing)
        self._sigmas = sigmas[first:]  # [N + 1]
        self._kind = settings.prediction_type
        self._slopes: list[Array] = []

    def scale(self, sample: Array, index: int) -> Array:
        """The sample at standard deviation 1."""
        return scaled(sample, self._sigmas[index])

    def step(self, output: Array, index: int, sample: Array, draw: Draw) -> Step:
        """Go to the next level."""
        sigma = self._sigmas[index]
        clean = clean_of_unscaled(self._kind, output, sample, sigma)
        self._slopes = [slope_of(sample, clean, sigma), *self._slopes[: _ORDER - 1]]
        nodes = self._sigmas[index - len(self._slopes) + 1 : index + 1][::-1].astype(np.float64)
        weights = _integrals(nodes, float(self._sigmas[index + 1]))
        terms: list[tuple[Scalar, Array]] = list(zip(weights, self._slopes, strict=True))
        return Step(combine((1.0, sample), *terms), clean)

    def add_noise(self, original: Array, noise: Array, index: int) -> Array:
        """The clean sample at level `index`."""
        return combine((1.0, original), (self._sigmas[index], noise))


def _integrals(nodes: np.ndarray[tuple[int], np.dtype[np.float64]], end: float) -> list[float]:
    """The integral from nodes[0] to `end` of each of Lagrange's basis polynomials."""
    start = nodes[0]
    shifted = nodes - start  # small numbers cancel less
    found = []
    for index, node in enumerate(shifted):
        others = np.delete(shifted, index)
        basis = polynomial.polyfromroots(others) / np.prod(node - others)
        found.append(float(polynomial.polyval(end - start, polynomial.polyint(basis))))
    return found
