"""The sampler of unCLIP's prior and decoders: DDPM over the cosine table, from the last timestep to 0.

Ramesh et al. 2022, arXiv 2204.06125; the step is that of Ho et al. 2020, arXiv 2006.11239.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from fmedge_runtimes.errors import RequestError
from fmedge_runtimes.schedulers.diffusion_table import diffused
from fmedge_runtimes.schedulers.noise_schedule import NoiseSchedule, betas
from fmedge_runtimes.schedulers.posterior import deviation_between, halves, posterior
from fmedge_runtimes.schedulers.prediction import clean_of, limiter
from fmedge_runtimes.schedulers.scheduler import Array, Draw, Step, combine
from fmedge_runtimes.schedulers.settings import ClipSettings, Settings
from fmedge_runtimes.schedulers.step_options import StepOptions
from fmedge_runtimes.schedulers.timesteps import check_count, whole


class UnCLIPSettings(Settings, ClipSettings):
    """UnCLIPScheduler's fields."""

    variance_type: Literal["fixed_small_log", "learned_range"] = "fixed_small_log"
    prediction_type: Literal["epsilon", "sample"] = "epsilon"
    beta_schedule: Literal["squaredcos_cap_v2"] = "squaredcos_cap_v2"

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """What determines the table."""
        return NoiseSchedule(self.num_train_timesteps, 0.0, 0.0, self.beta_schedule, None, zero_snr=False)


class UnCLIP:
    """Draws at every step but the last, which is at timestep 0."""

    init_noise_sigma = 1.0

    def __init__(self, settings: UnCLIPSettings, table: Array, options: StepOptions) -> None:
        """Take the table of cumulated alphas [T]. Raises RequestError for a single step."""
        if options.steps < 2:
            raise RequestError("UnCLIPScheduler goes from the last timestep to the first and needs at least 2 steps.")
        train = settings.num_train_timesteps
        check_count(train, options.steps)
        every = whole(np.arange(options.steps)[::-1] * ((train - 1) / (options.steps - 1)))
        signal = table[every]  # [N]
        left = np.append(signal[1:], np.float32(1))
        adjacent = every - np.append(every[1:], -1) == 1
        beta = np.where(adjacent, betas(settings.noise_schedule)[every], np.float32(1) - signal / left)
        self._first = options.first_step()
        self.timesteps = every[self._first :]
        self._posterior = posterior(signal, left, np.float32(1) - beta, beta)
        self._alpha, self._sigma = np.sqrt(signal), np.sqrt(np.float32(1) - signal)
        self._kind, self._variance = settings.prediction_type, settings.variance_type
        self._limit = limiter(clip=settings.clip, threshold=None)

    def scale(self, sample: Array, index: int) -> Array:
        """The sample itself."""
        return sample

    def step(self, output: Array, index: int, sample: Array, draw: Draw) -> Step:
        """Go to the next timestep; the output may carry the predicted variance behind the prediction, [B, 2 C, ...].

        Raises RequestError when the variance is learned and the output has none.
        """
        at = index + self._first
        predicted: Array | None = None
        if self._variance == "learned_range":
            output, predicted = halves(output, sample.shape[1])
            if predicted is None:
                raise RequestError(
                    "variance_type is learned_range, but the denoiser's output has no channels for it; "
                    "use a config with variance_type fixed_small_log."
                )
        clean = self._limit(clean_of(self._kind, output, sample, self._alpha[at], self._sigma[at]))
        following = combine((self._posterior.clean[at], clean), (self._posterior.sample[at], sample))
        if self.timesteps[index] > 0:
            if predicted is None:
                following += np.sqrt(self._posterior.variance[at]) * draw()
            else:
                following += deviation_between(self._posterior, at, predicted) * draw()
        return Step(following, clean)

    def add_noise(self, original: Array, noise: Array, index: int) -> Array:
        """The clean sample at timestep `index`."""
        return diffused(original, noise, self._alpha[index + self._first], self._sigma[index + self._first])
