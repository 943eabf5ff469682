"""DDPM: Ho et al. 2020, arXiv 2006.11239; its learned variance: Nichol and Dhariwal 2021, arXiv 2102.09672."""

from __future__ import annotations

from typing import Literal

import numpy as np

from fmedge_runtimes.errors import RequestError
from fmedge_runtimes.schedulers.diffusion_table import check_signal, diffused
from fmedge_runtimes.schedulers.posterior import deviation_between, halves, posterior
from fmedge_runtimes.schedulers.prediction import Prediction, clean_of, limiter
from fmedge_runtimes.schedulers.scheduler import Array, Draw, Step, combine
from fmedge_runtimes.schedulers.settings import ClipSettings, Count, ThresholdSettings, ZeroSnrSettings
from fmedge_runtimes.schedulers.step_options import StepOptions
from fmedge_runtimes.schedulers.timesteps import Spacing, check_in_table, spaced, whole


class DDPMSettings(ZeroSnrSettings, ClipSettings, ThresholdSettings):
    """DDPMScheduler's fields. fixed_large_log is left out: in diffusers it is the root of a negative number."""

    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"] = "linear"
    variance_type: Literal["fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range"] = "fixed_small"
    prediction_type: Prediction = "epsilon"
    timestep_spacing: Spacing = "leading"
    steps_offset: Count = 0


class DDPM:
    """Draws at every step but the one at timestep 0."""

    init_noise_sigma = 1.0

    def __init__(self, settings: DDPMSettings, table: Array, options: StepOptions) -> None:
        """Take the table of cumulated alphas [T]."""
        train = settings.num_train_timesteps
        if options.timesteps is not None:
            options.check_length("timesteps", options.timesteps)
            every = np.array(options.timesteps).astype(np.int64)
        else:
            every = whole(spaced(settings.timestep_spacing, train, options.steps, settings.steps_offset))
        check_in_table(every, len(table))
        signal = table[every]  # [N]
        left = np.append(signal[1:], np.float32(1))
        kept = signal / left
        self.timesteps = every[options.first_step() :]
        found = posterior(signal, left, kept, np.float32(1) - kept)
        self._first = options.first_step()
        check_signal(signal[self._first :], settings.prediction_type)
        self._alpha, self._sigma, self._posterior = np.sqrt(signal), np.sqrt(np.float32(1) - signal), found
        self._deviation = np.sqrt(found.beta if settings.variance_type == "fixed_large" else found.variance)
        self._kind, self._variance = settings.prediction_type, settings.variance_type
        self._limit = limiter(clip=settings.clip, threshold=settings.threshold)

    def scale(self, sample: Array, index: int) -> Array:
        """The sample itself."""
        return sample

    def step(self, output: Array, index: int, sample: Array, draw: Draw) -> Step:
        """Go to the next timestep; the output may carry the predicted variance behind the prediction, [B, 2 C, ...].

        Raises RequestError when the variance is learned and the output has none.
        """
        at = index + self._first
        predicted: Array | None = None
        if self._variance in ("learned", "learned_range"):
            output, predicted = halves(output, sample.shape[1])
        clean = self._limit(clean_of(self._kind, output, sample, self._alpha[at], self._sigma[at]))
        following = combine((self._posterior.clean[at], clean), (self._posterior.sample[at], sample))
        if self.timesteps[index] > 0:
            following += self._spread(at, predicted) * draw()
        return Step(following, clean)

    def _spread(self, at: int, predicted: Array | None) -> Array:
        if self._variance not in ("learned", "learned_range"):
            return self._deviation[at : at + 1]  # [1], as wide as any sample
        if predicted is None:
            raise RequestError(
                f"variance_type is {self._variance}, but the denoiser's output has no channels for it; "
                "use a config with variance_type fixed_small."
            )
        if self._variance == "learned":
            deviation: Array = np.sqrt(predicted)
            return deviation
        return deviation_between(self._posterior, at, predicted)

    def add_noise(self, original: Array, noise: Array, index: int) -> Array:
        """The clean sample at timestep `index`."""
        return diffused(original, noise, self._alpha[index + self._first], self._sigma[index + self._first])
