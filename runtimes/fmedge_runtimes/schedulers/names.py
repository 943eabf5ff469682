"""Short names of schedulers: a class of diffusers, and the fields that make it the method of that name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_MULTISTEP = "DPMSolverMultistepScheduler"
_SINGLESTEP = "DPMSolverSinglestepScheduler"


@dataclass(frozen=True, slots=True)
class Name:
    """A short name; fields that it does not set are the bundle's."""

    name: str
    class_name: str
    fields: Mapping[str, Any] = field(default_factory=dict)


NAMES = (
    Name("ddim", "DDIMScheduler"),
    Name("ddpm", "DDPMScheduler"),
    Name("pndm", "PNDMScheduler", {"skip_prk_steps": True}),
    Name("lms", "LMSDiscreteScheduler"),
    Name("lms-karras", "LMSDiscreteScheduler", {"use_karras_sigmas": True}),
    Name("euler", "EulerDiscreteScheduler"),
    Name("euler-karras", "EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    Name("euler-a", "EulerAncestralDiscreteScheduler"),
    Name("heun", "HeunDiscreteScheduler"),
    Name("heun-karras", "HeunDiscreteScheduler", {"use_karras_sigmas": True}),
    Name("dpm++2m", _MULTISTEP, {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    Name("dpm++2m-karras", _MULTISTEP, {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_karras_sigmas": True}),
    Name("dpm++2m-sde", _MULTISTEP, {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    Name(
        "dpm++2m-sde-karras",
        _MULTISTEP,
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 2, "use_karras_sigmas": True},
    ),
    Name("dpm++3m", _MULTISTEP, {"algorithm_type": "dpmsolver++", "solver_order": 3}),
    Name("dpm++2s", _SINGLESTEP, {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    Name(
        "dpm++2s-karras", _SINGLESTEP, {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_karras_sigmas": True}
    ),
    Name("unipc", "UniPCMultistepScheduler"),
    Name("unipc-karras", "UniPCMultistepScheduler", {"use_karras_sigmas": True}),
    Name("lcm", "LCMScheduler"),
    Name("flow-euler", "FlowMatchEulerDiscreteScheduler"),
)

BY_NAME = {row.name: row for row in NAMES}
