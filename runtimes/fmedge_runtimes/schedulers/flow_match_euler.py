"""Euler's method over the flow of rectified flow matching: Esser et al. 2024 (Stable Diffusion 3), arXiv 2403.03206.

A sample at level sigma is (1 - sigma) * clean + sigma * noise, and the network predicts noise - clean.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import model_validator

from fmedge_runtimes.errors import RequestError
from fmedge_runtimes.schedulers.scheduler import Array, Draw, Numbers, Step, combine
from fmedge_runtimes.schedulers.settings import Finite, Positive, PositiveFloat, Settings, SigmaSettings, Terminal
from fmedge_runtimes.schedulers.sigma_sampling import spread
from fmedge_runtimes.schedulers.sigmas import shifted, shifted_by_size, stretched
from fmedge_runtimes.schedulers.step_options import StepOptions


class FlowMatchEulerSettings(Settings, SigmaSettings):
    """FlowMatchEulerDiscreteScheduler's fields."""

    shift: PositiveFloat = 1.0
    use_dynamic_shifting: bool = False
    base_shift: Finite | None = 0.5
    max_shift: Finite | None = 1.15
    base_image_seq_len: Positive = 256
    max_image_seq_len: Positive = 4096
    invert_sigmas: bool = False
    shift_terminal: Terminal | None = None
    time_shift_type: Literal["exponential", "linear"] = "exponential"
    stochastic_sampling: bool = False

    @model_validator(mode="after")
    def _growing(self) -> FlowMatchEulerSettings:
        if self.base_image_seq_len >= self.max_image_seq_len:
            raise ValueError("base_image_seq_len must be below max_image_seq_len")
        return self


class FlowMatchEuler:
    """Deterministic, unless the config says stochastic_sampling: then it draws at every step."""

    init_noise_sigma = 1.0

    def __init__(self, settings: FlowMatchEulerSettings, table: Array, options: StepOptions) -> None:
        """Take no table: the levels are continuous."""
        sigmas = _levels(settings, options).astype(np.float32)
        timesteps = sigmas * np.float32(settings.num_train_timesteps)
        if options.timesteps is not None:
            timesteps = np.array(options.timesteps, np.float32)
        if settings.invert_sigmas:
            sigmas = np.float32(1) - sigmas
            timesteps = sigmas * np.float32(settings.num_train_timesteps)
        self._end = np.float32(1 if settings.invert_sigmas else 0)
        first = options.first_flow_step()
        self.timesteps = timesteps[first:]  # [N]
        self._sigmas = np.append(sigmas, self._end)[first:]  # [N + 1]
        self._stochastic = settings.stochastic_sampling

    def scale(self, sample: Array, index: int) -> Array:
        """The sample itself."""
        return sample

    def step(self, output: Array, index: int, sample: Array, draw: Draw) -> Step:
        """Follow the predicted direction to the next level; or to the clean sample, and noise it again."""
        sigma, following = self._sigmas[index], self._sigmas[index + 1]
        clean = combine((1.0, sample), (self._end - sigma, output))
        if self._stochastic:
            start = combine((1.0, sample), (-sigma, output))
            return Step(combine((1 - following, start), (following, draw())), clean)
        return Step(combine((1.0, sample), (following - sigma, output)), clean)

    def add_noise(self, original: Array, noise: Array, index: int) -> Array:
        """The clean sample at level `index`."""
        sigma = self._sigmas[index]
        return combine((1 - sigma, original), (sigma, noise))


def mu_of(settings: FlowMatchEulerSettings, tokens: int) -> float | None:
    """The shift's logarithm for an image of so many tokens; None where the config has a fixed shift.

    It grows linearly from base_shift at base_image_seq_len to max_shift at max_image_seq_len.
    """
    if not settings.use_dynamic_shifting:
        return None
    base, top = settings.base_shift, settings.max_shift
    if base is None or top is None:
        raise RequestError("use_dynamic_shifting needs base_shift and max_shift in the scheduler's config.")
    slope = (top - base) / (settings.max_image_seq_len - settings.base_image_seq_len)
    return tokens * slope + (base - slope * settings.base_image_seq_len)


def _levels(settings: FlowMatchEulerSettings, options: StepOptions) -> Numbers:
    """Levels from noise towards the clean sample, shifted and spaced as the config says, [N]."""
    sigmas = _unshifted(settings, options)
    if settings.use_dynamic_shifting:
        if options.mu is None:
            raise RequestError("use_dynamic_shifting needs mu, which depends on the image's size; give mu.")
        sigmas = shifted_by_size(sigmas, options.mu, settings.time_shift_type)
    elif options.mu is not None:
        raise RequestError("mu has an effect only where the config says use_dynamic_shifting; leave it out.")
    else:
        sigmas = shifted(sigmas, settings.shift)
    if settings.shift_terminal:
        sigmas = stretched(sigmas, settings.shift_terminal)
    return spread(sigmas[0], sigmas[-1], settings, options.steps) if settings.respaced else sigmas


def _unshifted(settings: FlowMatchEulerSettings, options: StepOptions) -> Numbers:
    train = settings.num_train_timesteps
    if options.sigmas is not None:
        options.check_length("sigmas", options.sigmas)
        return np.array(options.sigmas, np.float32)
    if options.timesteps is not None:
        options.check_length("timesteps", options.timesteps)
        return np.array(options.timesteps, np.float32) / np.float32(train)
    ends = np.array([train, 1], np.float32) / np.float32(train)
    if not settings.use_dynamic_shifting:
        # diffusers shifts the ends when it is made, and all levels again for a trajectory.
        ends = shifted(ends, settings.shift)
    return np.linspace(float(ends[0]) * train, float(ends[1]) * train, options.steps) / train
