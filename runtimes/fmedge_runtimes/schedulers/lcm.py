"""Latent consistency models: Luo et al. 2023, arXiv 2310.04378; consistency models: Song et al. 2023, arXiv 2303.01469.

Every step jumps to a clean sample and noises it again to the next timestep.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from fmedge_runtimes.errors import RequestError
from fmedge_runtimes.schedulers.diffusion_table import check_signal, diffused
from fmedge_runtimes.schedulers.prediction import Prediction, clean_of, limiter
from fmedge_runtimes.schedulers.scheduler import Array, Draw, Step, combine
from fmedge_runtimes.schedulers.settings import (
    Beta,
    ClipSettings,
    Count,
    Positive,
    PositiveFloat,
    ThresholdSettings,
    ZeroSnrSettings,
)
from fmedge_runtimes.schedulers.step_options import StepOptions
from fmedge_runtimes.schedulers.timesteps import Spacing, check_in_table

_DATA_VARIANCE = np.float32(0.25)


class LCMSettings(ZeroSnrSettings, ClipSettings, ThresholdSettings):
    """LCMScheduler's fields.

    set_alpha_to_one, steps_offset and timestep_spacing change nothing in diffusers either: the schedule is LCM's own.
    """

    beta_start: Beta = 0.00085
    beta_end: Beta = 0.012
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"
    original_inference_steps: Positive = 50
    clip_sample: bool = False
    set_alpha_to_one: bool = True
    steps_offset: Count = 0
    prediction_type: Prediction = "epsilon"
    timestep_spacing: Spacing = "leading"
    timestep_scaling: PositiveFloat = 10.0


class LCM:
    """Draws at every step but the last."""

    init_noise_sigma = 1.0

    def __init__(self, settings: LCMSettings, table: Array, options: StepOptions) -> None:
        """Take the table of cumulated alphas [T]. Raises RequestError when the model's own schedule has fewer steps."""
        if options.timesteps is not None:
            options.check_length("timesteps", options.timesteps)
            every = np.array(options.timesteps).astype(np.int64)
        else:
            every = _own_schedule(settings, options)
        self.timesteps = every if options.respaced else every[options.first_step() :]  # [N]
        check_in_table(self.timesteps, len(table))
        signal = table[self.timesteps]
        check_signal(signal, settings.prediction_type)
        self._alpha, self._sigma = np.sqrt(signal), np.sqrt(np.float32(1) - signal)
        # Near timestep 0 a consistency model is the identity (Song et al., section 3).
        scaled = self.timesteps.astype(np.float32) * np.float32(settings.timestep_scaling)
        power = np.square(scaled) + _DATA_VARIANCE
        self._skip, self._out = _DATA_VARIANCE / power, scaled / np.sqrt(power)
        self._kind = settings.prediction_type
        self._limit = limiter(clip=settings.clip, threshold=settings.threshold)

    def scale(self, sample: Array, index: int) -> Array:
        """The sample itself."""
        return sample

    def step(self, output: Array, index: int, sample: Array, draw: Draw) -> Step:
        """Go to the next timestep."""
        clean = self._limit(clean_of(self._kind, output, sample, self._alpha[index], self._sigma[index]))
        denoised = combine((self._out[index], clean), (self._skip[index], sample))
        if index == len(self.timesteps) - 1:
            return Step(denoised, denoised)
        return Step(self.add_noise(denoised, draw(), index + 1), denoised)

    def add_noise(self, original: Array, noise: Array, index: int) -> Array:
        """The clean sample at timestep `index`."""
        return diffused(original, noise, self._alpha[index], self._sigma[index])


def _own_schedule(settings: LCMSettings, options: StepOptions) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Timesteps out of those of the distillation, evenly, from the noisiest on, int64 [N]."""
    original = options.original_steps or settings.original_inference_steps
    train = settings.num_train_timesteps
    if original > train:
        raise RequestError(f"original_steps is {original}, more than the model's {train} timesteps; use at most those.")
    usable = int(original * options.strength) if options.respaced else original
    if options.steps > usable:
        raise RequestError(
            f"{options.steps} steps exceed the {usable} of the schedule that the model was distilled with; use fewer."
        )
    distilled = np.arange(usable, 0, -1) * (train // original) - 1
    return distilled[np.floor(np.linspace(0, usable, options.steps, endpoint=False)).astype(np.int64)].astype(np.int64)
