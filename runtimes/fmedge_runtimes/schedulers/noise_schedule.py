"""How much of the signal is left at each training timestep: betas, and the cumulated product of 1 - beta.

The tables are float32 and made as torch makes them, so that they equal diffusers' to the last bit where the processor
has fused multiply-add; a bundle may bring the product itself.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fmedge_runtimes.schedulers.scheduler import Array

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "exp"]

ALMOST_ZERO = np.float32(2.0**-24)
"""What replaces a signal of zero where a scheduler divides by it: the smallest number of half precision."""


@dataclass(frozen=True, slots=True)
class NoiseSchedule:
    """What determines the table."""

    train_timesteps: int
    beta_start: float
    beta_end: float
    beta_schedule: BetaSchedule
    trained_betas: tuple[float, ...] | None
    zero_snr: bool

    @property
    def size(self) -> int:
        """Entries of the table."""
        return self.train_timesteps if self.trained_betas is None else len(self.trained_betas)


def betas(schedule: NoiseSchedule) -> Array:
    """Noise added at each training timestep, float32 [T], before any rescaling.

    linear: Ho et al. 2020, arXiv 2006.11239; scaled_linear: Rombach et al. 2022, arXiv 2112.10752; squaredcos_cap_v2:
    Nichol and Dhariwal 2021, arXiv 2102.09672; laplace: Hang et al. 2024, arXiv 2407.03297.
    """
    count, first, last = schedule.train_timesteps, schedule.beta_start, schedule.beta_end
    if schedule.trained_betas is not None:
        return np.array(schedule.trained_betas, np.float32)
    if schedule.beta_schedule == "linear":
        return linspace(first, last, count)
    if schedule.beta_schedule == "scaled_linear":
        return np.square(linspace(first**0.5, last**0.5, count))
    if schedule.beta_schedule == "sigmoid":
        logistic = (1 / (1 + np.exp(-linspace(-6, 6, count).astype(np.float64)))).astype(np.float32)
        return logistic * np.float32(last - first) + np.float32(first)
    left = _SIGNAL_LEFT[schedule.beta_schedule]
    return np.array([min(1 - left((i + 1) / count) / left(i / count), 0.999) for i in range(count)], np.float32)


@functools.lru_cache(maxsize=8)
def alphas_cumprod(schedule: NoiseSchedule) -> Array:
    """Share of the signal's variance that is left at each training timestep, float32 [T], read-only."""
    kept = np.float32(1) - betas(schedule)
    table = _products(kept)
    if schedule.zero_snr:
        table = _products(np.float32(1) - (np.float32(1) - _without_terminal_signal(table)))
    table.flags.writeable = False
    return table


def linspace(first: float, last: float, count: int) -> Array:
    """torch.linspace in float32, [count]: counted from the nearer end, each value rounded once."""
    if count == 1:
        return np.array([first], np.float32)
    low, high = np.float32(first), np.float32(last)
    step = np.float64((high - low) / np.float32(count - 1))
    index = np.arange(count)
    return np.where(index < count // 2, low + step * index, high - step * (count - 1 - index)).astype(np.float32)


def _products(kept: Array) -> Array:
    return np.cumprod(kept.astype(np.float64)).astype(np.float32)  # torch accumulates in float64


def _without_terminal_signal(table: Array) -> Array:
    """Factors [T] of a table whose last entry is 0 and whose first is kept (Lin et al. 2023, arXiv 2305.08891)."""
    amplitude = np.sqrt(table)
    first, last = amplitude[0], amplitude[-1]
    amplitude = (amplitude - last) * (first / (first - last))
    power = np.square(amplitude)
    return np.concatenate([power[:1], power[1:] / power[:-1]])


def _cosine(t: float) -> float:
    return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace(t: float) -> float:
    half_log_snr = -0.5 * math.copysign(1, 0.5 - t) * math.log(1 - 2 * abs(0.5 - t) + 1e-6)
    return math.sqrt(1 / (1 + math.exp(-half_log_snr)))


_SIGNAL_LEFT: dict[str, Callable[[float], float]] = {
    "squaredcos_cap_v2": _cosine,
    "laplace": _laplace,
    "exp": lambda t: math.exp(-12.0 * t),
}
