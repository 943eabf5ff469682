"""The table of schedulers, by diffusers' class names. A new one is a file and a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fmedge_runtimes.schedulers.ddim import DDIM, DDIMSettings
from fmedge_runtimes.schedulers.ddpm import DDPM, DDPMSettings
from fmedge_runtimes.schedulers.dpm_multistep import DPMMultistep, DPMMultistepSettings
from fmedge_runtimes.schedulers.dpm_singlestep import DPMSinglestep, DPMSinglestepSettings
from fmedge_runtimes.schedulers.euler import Euler, EulerSettings
from fmedge_runtimes.schedulers.euler_ancestral import EulerAncestral, EulerAncestralSettings
from fmedge_runtimes.schedulers.flow_match_euler import FlowMatchEuler, FlowMatchEulerSettings
from fmedge_runtimes.schedulers.heun import Heun, HeunSettings
from fmedge_runtimes.schedulers.lcm import LCM, LCMSettings
from fmedge_runtimes.schedulers.lms import LMS, LMSSettings
from fmedge_runtimes.schedulers.pndm import PNDM, PNDMSettings
from fmedge_runtimes.schedulers.settings import Settings
from fmedge_runtimes.schedulers.unclip import UnCLIP, UnCLIPSettings
from fmedge_runtimes.schedulers.unipc import UniPC, UniPCSettings


@dataclass(frozen=True, slots=True)
class Row:
    """A scheduler: its fields, its class, made from (settings, table, options), and what a caller may set."""

    settings: type[Settings]
    scheduler: Any
    options: frozenset[str] = frozenset()
    """Of `StepOptions`, besides steps and strength."""
    nonzero: bool = False
    """The table's terminal zero (rescale_betas_zero_snr) is replaced by the smallest number of half precision."""


SCHEDULERS: dict[str, Row] = {
    "DDIMScheduler": Row(DDIMSettings, DDIM, frozenset({"eta"})),
    "DDPMScheduler": Row(DDPMSettings, DDPM, frozenset({"timesteps"})),
    "PNDMScheduler": Row(PNDMSettings, PNDM),
    "LMSDiscreteScheduler": Row(LMSSettings, LMS),
    "EulerDiscreteScheduler": Row(EulerSettings, Euler, frozenset({"timesteps", "sigmas"}), nonzero=True),
    "EulerAncestralDiscreteScheduler": Row(EulerAncestralSettings, EulerAncestral, nonzero=True),
    "HeunDiscreteScheduler": Row(HeunSettings, Heun, frozenset({"timesteps"})),
    "DPMSolverMultistepScheduler": Row(
        DPMMultistepSettings, DPMMultistep, frozenset({"timesteps", "mu"}), nonzero=True
    ),
    "DPMSolverSinglestepScheduler": Row(DPMSinglestepSettings, DPMSinglestep, frozenset({"timesteps", "mu"})),
    "UniPCMultistepScheduler": Row(UniPCSettings, UniPC, frozenset({"sigmas", "mu"}), nonzero=True),
    "LCMScheduler": Row(LCMSettings, LCM, frozenset({"timesteps", "original_steps", "respaced"})),
    "FlowMatchEulerDiscreteScheduler": Row(
        FlowMatchEulerSettings, FlowMatchEuler, frozenset({"timesteps", "sigmas", "mu"})
    ),
    "UnCLIPScheduler": Row(UnCLIPSettings, UnCLIP),
}

SWITCHABLE = frozenset(SCHEDULERS) - {"FlowMatchEulerDiscreteScheduler", "UnCLIPScheduler"}
"""Schedulers for any model with a table of betas."""

FOREIGN_FIELDS = frozenset({"noise_sampler_seed", "rho", "sigma_data", "sigma_schedule"})
"""Fields of schedulers of diffusers that are not in the table (DPMSolverSDE, EDMEuler); configs may carry them."""
