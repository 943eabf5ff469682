"""Schedulers of diffusion models in numpy, each equal to diffusers' over whole trajectories; docs/schedulers.md.

config = read_config(Path("bundle/scheduler"))
scheduler = open_scheduler(switch(config, "dpm++2m-karras"), steps=20)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fmedge_runtimes.schedulers.config import (
    SchedulerConfig,
    noise_schedule,
    parse_config,
    read_config,
    switch,
    with_table,
)
from fmedge_runtimes.schedulers.flow_match_euler import FlowMatchEulerSettings, mu_of
from fmedge_runtimes.schedulers.names import BY_NAME, NAMES, Name
from fmedge_runtimes.schedulers.noise_schedule import ALMOST_ZERO, alphas_cumprod
from fmedge_runtimes.schedulers.registry import SCHEDULERS
from fmedge_runtimes.schedulers.scheduler import Array, Draw, Scheduler, Step
from fmedge_runtimes.schedulers.step_options import StepOptions

__all__ = [
    "BY_NAME",
    "NAMES",
    "SCHEDULERS",
    "Array",
    "Draw",
    "FlowMatchEulerSettings",
    "Name",
    "Scheduler",
    "SchedulerConfig",
    "Step",
    "StepOptions",
    "mu_of",
    "open_scheduler",
    "parse_config",
    "read_config",
    "switch",
    "table_of",
    "with_table",
]


def open_scheduler(
    config: SchedulerConfig,
    steps: int,
    *,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    mu: float | None = None,
    strength: float = 1.0,
    eta: float = 0.0,
    original_steps: int | None = None,
    respaced: bool = False,
) -> Scheduler:
    """Begin a trajectory; `StepOptions` says what each option is. Raises RequestError for what cannot be served."""
    options = StepOptions(
        steps=steps,
        timesteps=None if timesteps is None else tuple(float(value) for value in timesteps),
        sigmas=None if sigmas is None else tuple(float(value) for value in sigmas),
        mu=mu,
        strength=strength,
        eta=eta,
        original_steps=original_steps,
        respaced=respaced,
    )
    row = SCHEDULERS[config.class_name]
    options.check_taken(row.options, config.class_name)
    scheduler: Scheduler = row.scheduler(config.settings, table_of(config), options)
    return scheduler


def table_of(config: SchedulerConfig) -> Array:
    """Share of the signal's variance left at each training timestep, float32 [T]; empty for flow matching."""
    schedule = noise_schedule(config.settings)
    if schedule is None:
        return np.empty(0, np.float32)
    table = alphas_cumprod(schedule) if config.alphas_cumprod is None else config.alphas_cumprod
    if schedule.zero_snr and SCHEDULERS[config.class_name].nonzero:
        table = table.copy()
        table[-1] = ALMOST_ZERO
    return table
