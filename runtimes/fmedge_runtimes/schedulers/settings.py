"""Fields that the schedulers' configs share, under diffusers' names, with diffusers' defaults.

Each scheduler's file declares its own record on top of these: every field is there, and its type lists the values that
are implemented. Others are refused when the config is read.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fmedge_runtimes.schedulers.noise_schedule import BetaSchedule, NoiseSchedule

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(gt=0, lt=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Terminal = Annotated[float, Field(ge=0, lt=1)]
Order = Annotated[int, Field(ge=1, le=3)]


class Settings(BaseModel):
    """The fields of one scheduler class."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=True)

    num_train_timesteps: Annotated[int, Field(ge=2)] = 1000


class BetaSettings(Settings):
    """A model that was trained with a table of betas."""

    beta_start: Beta = 0.0001
    beta_end: Beta = 0.02
    beta_schedule: BetaSchedule = "linear"
    trained_betas: Annotated[tuple[Beta, ...], Field(min_length=2)] | None = None

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """What determines the table."""
        return NoiseSchedule(
            self.num_train_timesteps,
            self.beta_start,
            self.beta_end,
            self.beta_schedule,
            self.trained_betas,
            zero_snr=isinstance(self, ZeroSnrSettings) and self.rescale_betas_zero_snr,
        )


class ZeroSnrSettings(BetaSettings):
    """Betas that can be rescaled so that the last timestep is noise alone."""

    rescale_betas_zero_snr: bool = False


class ThresholdSettings(BaseModel):
    """Dynamic thresholding of the clean sample."""

    thresholding: bool = False
    dynamic_thresholding_ratio: Fraction = 0.995
    sample_max_value: PositiveFloat = 1.0

    @property
    def threshold(self) -> tuple[float, float] | None:
        """(ratio, maximum), or None."""
        return (self.dynamic_thresholding_ratio, self.sample_max_value) if self.thresholding else None


class ClipSettings(BaseModel):
    """Clipping of the clean sample."""

    clip_sample: bool = True
    clip_sample_range: PositiveFloat = 1.0

    @property
    def clip(self) -> float | None:
        """The bound, or None."""
        return self.clip_sample_range if self.clip_sample else None


class SigmaSettings(BaseModel):
    """Noise levels that can be spaced anew. At most one of the three may be on."""

    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_beta_sigmas: Literal[False] | None = False
    sigma_min: PositiveFloat | None = None
    sigma_max: PositiveFloat | None = None

    @model_validator(mode="after")
    def _one_spacing(self) -> SigmaSettings:
        if self.use_karras_sigmas and self.use_exponential_sigmas:
            raise ValueError("only one of use_karras_sigmas and use_exponential_sigmas can be used")
        if self.sigma_min is not None and self.sigma_max is not None and self.sigma_min >= self.sigma_max:
            raise ValueError("sigma_min must be below sigma_max")
        return self

    @property
    def respaced(self) -> bool:
        """Whether the levels are spaced anew."""
        return bool(self.use_karras_sigmas or self.use_exponential_sigmas)


class ShiftSettings(BaseModel):
    """Solvers for models with betas that can also run a flow-matching model."""

    use_flow_sigmas: bool = False
    flow_shift: PositiveFloat = 1.0
    use_dynamic_shifting: bool = False


NEGATIVE_INFINITY = -math.inf
