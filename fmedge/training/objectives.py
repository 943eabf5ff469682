"""What a diffusion model learns to predict: one row for each objective.

Forward diffusion makes of a clean picture and noise the noisy picture `signal * clean + noise_level * noise`, at a
time from 0 (clean) to 1000 (noise). The model sees the noisy picture and the time, and predicts the target. Reverse
diffusion is the scheduler's: `diffusers.DPMSolverMultistepScheduler` (Lu et al. 2022, arXiv 2211.01095), configured to
read the same times and the same prediction.

- flow-x: rectified flow (Liu et al. 2022, arXiv 2209.03003) whose model predicts the clean picture while its loss is
  that of the velocity, which suits patches with more values than the model is wide (Li and He 2025, arXiv 2511.13720)
- flow-v: rectified flow, predicting the velocity noise - clean
- ddpm-epsilon: DDPM (Ho et al. 2020, arXiv 2006.11239), predicting the noise, with the cosine schedule of Nichol and
  Dhariwal (2021, arXiv 2102.09672)
- ddpm-v: the same, predicting signal * noise - noise_level * clean (Salimans and Ho 2022, arXiv 2202.00512)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from numpy.typing import NDArray

TIMES = 1000
SMALLEST_NOISE = 0.05
"""The velocity divides by the noise level, and pictures with less noise than this must not rule the loss."""
MORE_NOISE = 0.5
FLOW = {"use_flow_sigmas": True, "solver_order": 2, "final_sigmas_type": "zero"}
DDPM = {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing", "solver_order": 2}


@dataclass(frozen=True, slots=True)
class Objective:
    """A forward process, a target, and the scheduler that goes back."""

    scheduler_config: Mapping[str, Any]
    times: Callable[[np.random.Generator, int], NDArray[np.float32]]
    """Draws times to train on, [B]."""
    levels: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    """From times [B] to signal and noise levels [B]."""
    target: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    """From clean, noise [B, C, H, W], signal and noise level [B, 1, 1, 1] to what is predicted."""
    weight: Callable[[torch.Tensor], torch.Tensor]
    """From the noise level to the weight of the squared error."""

    def scheduler(self) -> DPMSolverMultistepScheduler:
        """Build the scheduler that samples."""
        return DPMSolverMultistepScheduler(num_train_timesteps=TIMES, **self.scheduler_config)

    def loss(
        self, model: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], clean: torch.Tensor, draw: Draw
    ) -> torch.Tensor:
        """The mean weighted squared error of a model on clean pictures [B, C, H, W] in -1 to 1."""
        signal, noise_level = (level[:, None, None, None] for level in self.levels(draw.times))  # [B, 1, 1, 1]
        output = model(signal * clean + noise_level * draw.noise, draw.times).float()
        error = output - self.target(clean, draw.noise, signal, noise_level)
        return (self.weight(noise_level) * error.square()).mean()


@dataclass(frozen=True, slots=True)
class Draw:
    """What chance decides of a batch."""

    times: torch.Tensor
    """[B]"""
    noise: torch.Tensor
    """[B, C, H, W]"""


def _logit_normal(random: np.random.Generator, count: int) -> NDArray[np.float32]:
    """Few times near the ends (Esser et al. 2024, arXiv 2403.03206), and more of much noise than of little.

    Where there is much noise, only the caption says where things are, and a model that does not learn it there draws
    pieces that do not fit.
    """
    normal = random.standard_normal(count, dtype=np.float32) + np.float32(MORE_NOISE)
    times: NDArray[np.float32] = TIMES / (1 + np.exp(-normal))
    return times


def _uniform(random: np.random.Generator, count: int) -> NDArray[np.float32]:
    return random.integers(TIMES, size=count).astype(np.float32)


def _flow_levels(times: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return 1 - times / TIMES, times / TIMES


@functools.cache
def _cosine_table() -> torch.Tensor:
    """The cumulated product of alphas, [TIMES]."""
    table: torch.Tensor = DPMSolverMultistepScheduler(num_train_timesteps=TIMES, **DDPM).alphas_cumprod
    return table


def _cosine_levels(times: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    product = _cosine_table().to(times.device)[times.long()]
    return product.sqrt(), (1 - product).sqrt()


OBJECTIVES: Mapping[str, Objective] = MappingProxyType(
    {
        "flow-x": Objective(
            scheduler_config={**FLOW, "prediction_type": "sample"},
            times=_logit_normal,
            levels=_flow_levels,
            target=lambda clean, noise, signal, noise_level: clean,
            weight=lambda noise_level: noise_level.clamp(min=SMALLEST_NOISE) ** -2,
        ),
        "flow-v": Objective(
            scheduler_config={**FLOW, "prediction_type": "flow_prediction"},
            times=_logit_normal,
            levels=_flow_levels,
            target=lambda clean, noise, signal, noise_level: noise - clean,
            weight=torch.ones_like,
        ),
        "ddpm-epsilon": Objective(
            scheduler_config={**DDPM, "prediction_type": "epsilon"},
            times=_uniform,
            levels=_cosine_levels,
            target=lambda clean, noise, signal, noise_level: noise,
            weight=torch.ones_like,
        ),
        "ddpm-v": Objective(
            scheduler_config={**DDPM, "prediction_type": "v_prediction"},
            times=_uniform,
            levels=_cosine_levels,
            target=lambda clean, noise, signal, noise_level: signal * noise - noise_level * clean,
            weight=torch.ones_like,
        ),
    }
)
