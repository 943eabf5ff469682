"""Noise levels: from the table of a model with betas, spaced anew, shifted for flow matching, and back to timesteps."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np

from fmedge_runtimes.errors import RequestError
from fmedge_runtimes.schedulers.scheduler import Array, Numbers


class Respacing(Protocol):
    """The fields of a config that space levels anew (`SigmaSettings`)."""

    @property
    def use_karras_sigmas(self) -> bool | None: ...
    @property
    def use_exponential_sigmas(self) -> bool | None: ...
    @property
    def sigma_min(self) -> float | None: ...
    @property
    def sigma_max(self) -> float | None: ...


def sigma_table(alphas_cumprod: Array) -> Array:
    """Noise level relative to the signal at each training timestep, float32 [T], ascending."""
    table: Array = np.sqrt((np.float32(1) - alphas_cumprod) / alphas_cumprod)
    return table


def karras(high: float, low: float, count: int) -> Numbers:
    """Levels equally spaced in sigma ** (1 / 7), float64 [count] (Karras et al. 2022, arXiv 2206.00364, eq. 5)."""
    rho = 7.0
    first, last = high ** (1 / rho), low ** (1 / rho)
    return np.asarray((first + np.linspace(0, 1, count) * (last - first)) ** rho)


def exponential(high: float, low: float, count: int) -> Numbers:
    """Levels equally spaced in log(sigma), float64 [count]."""
    return np.exp(np.linspace(math.log(high), math.log(low), count))


def timesteps_of(sigmas: Numbers, table: Array) -> Numbers:
    """Where the levels lie in the table of the training timesteps, interpolated in log(sigma), float64 [N]."""
    levels, logs = np.log(np.maximum(sigmas, 1e-10)), np.log(table)
    low = np.clip(np.searchsorted(logs, levels, side="right") - 1, 0, len(logs) - 2)
    below, above = logs[low], logs[low + 1]
    weight = np.clip((below - levels) / (below - above), 0, 1)
    return np.asarray((1 - weight) * low + weight * (low + 1))


def shifted(sigmas: Numbers, shift: float) -> Numbers:
    """Levels of flow matching moved towards noise (Esser et al. 2024, arXiv 2403.03206, eq. 23)."""
    return np.asarray(shift * sigmas / (1 + (shift - 1) * sigmas))


def shifted_by_size(sigmas: Numbers, mu: float, kind: str) -> Numbers:
    """`shifted` by exp(mu) (kind "exponential") or mu (kind "linear"), which depend on the image's size."""
    shift = math.exp(mu) if kind == "exponential" else mu
    return np.asarray(shift / (shift + (1 / sigmas - 1)))


def stretched(sigmas: Numbers, last: float) -> Numbers:
    """Levels of flow matching stretched so that the last one is `last`. Raises RequestError for one."""
    if len(sigmas) < 2:
        raise RequestError("shift_terminal stretches the levels between the first and the last; use at least 2 steps.")
    signal = 1 - sigmas
    return np.asarray(1 - signal / (signal[-1] / (1 - last)))
