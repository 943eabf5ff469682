"""DDIM: Song et al. 2021, arXiv 2010.02502, equations 12 and 16."""

from __future__ import annotations

from typing import Literal

import numpy as np

from fmedge_runtimes.schedulers.diffusion_table import check_signal, diffused
from fmedge_runtimes.schedulers.prediction import Prediction, clean_of, limiter, noise_of
from fmedge_runtimes.schedulers.scheduler import Array, Draw, Step, combine
from fmedge_runtimes.schedulers.settings import ClipSettings, Count, ThresholdSettings, ZeroSnrSettings
from fmedge_runtimes.schedulers.step_options import StepOptions
from fmedge_runtimes.schedulers.timesteps import Spacing, check_in_table, spaced, whole


class DDIMSettings(ZeroSnrSettings, ClipSettings, ThresholdSettings):
    """DDIMScheduler's fields."""

    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    set_alpha_to_one: bool = True
    steps_offset: Count = 0
    prediction_type: Prediction = "epsilon"
    timestep_spacing: Spacing = "leading"


class DDIM:
    """Deterministic at eta 0."""

    init_noise_sigma = 1.0

    def __init__(self, settings: DDIMSettings, table: Array, options: StepOptions) -> None:
        """Take the table of cumulated alphas [T]."""
        train = settings.num_train_timesteps
        every = whole(spaced(settings.timestep_spacing, train, options.steps, settings.steps_offset))
        self.timesteps = every[options.first_step() :]  # [N]
        check_in_table(self.timesteps, len(table))
        before = self.timesteps - train // options.steps
        last = np.float32(1) if settings.set_alpha_to_one else table[0]
        signal, left = table[self.timesteps], np.where(before >= 0, table[before], last)  # [N]
        check_signal(signal, settings.prediction_type)
        noise, noise_left = np.float32(1) - signal, np.float32(1) - left
        drawn = np.float32(options.eta) * np.sqrt(noise_left / noise * (np.float32(1) - signal / left))
        self._alpha, self._sigma = np.sqrt(signal), np.sqrt(noise)
        self._alpha_left, self._drawn = np.sqrt(left), drawn
        self._direction = np.sqrt(np.maximum(noise_left - np.square(drawn), 0))
        self._stochastic = options.eta > 0
        self._kind = settings.prediction_type
        self._limit = limiter(clip=settings.clip, threshold=settings.threshold)

    def scale(self, sample: Array, index: int) -> Array:
        """The sample itself."""
        return sample

    def step(self, output: Array, index: int, sample: Array, draw: Draw) -> Step:
        """Go to the next timestep; draws once if eta is above 0."""
        alpha, sigma = self._alpha[index], self._sigma[index]
        clean = self._limit(clean_of(self._kind, output, sample, alpha, sigma))
        noise = noise_of(self._kind, output, sample, alpha, sigma)
        following = combine((self._alpha_left[index], clean), (self._direction[index], noise))
        if self._stochastic:
            following += self._drawn[index] * draw()
        return Step(following, clean)

    def add_noise(self, original: Array, noise: Array, index: int) -> Array:
        """The clean sample at timestep `index`."""
        return diffused(original, noise, self._alpha[index], self._sigma[index])
