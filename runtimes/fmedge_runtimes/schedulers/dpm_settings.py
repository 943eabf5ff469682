"""Fields that DPM-Solver's two schedulers share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from fmedge_runtimes.schedulers.log_snr import Conversion, Solver
from fmedge_runtimes.schedulers.prediction import limiter
from fmedge_runtimes.schedulers.scheduler import Array
from fmedge_runtimes.schedulers.settings import (
    NEGATIVE_INFINITY,
    Order,
    ShiftSettings,
    SigmaSettings,
    ThresholdSettings,
)


def _without_deis(value: object) -> object:
    return "dpmsolver++" if value == "deis" else value


def _own_solver(value: object) -> object:
    return "midpoint" if value in ("logrho", "bh1", "bh2") else value


Algorithm = Annotated[
    Literal["dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver"], BeforeValidator(_without_deis)
]
"""Names of other solvers, which a config may have kept, mean the default, as in diffusers."""
SolverType = Annotated[Literal["midpoint", "heun"], BeforeValidator(_own_solver)]


class DPMSettings(ThresholdSettings, SigmaSettings, ShiftSettings):
    """The fields, and which of their values go together."""

    solver_order: Order = 2
    prediction_type: Literal["epsilon", "sample", "v_prediction", "flow_prediction"] = "epsilon"
    algorithm_type: Algorithm = "dpmsolver++"
    solver_type: SolverType = "midpoint"
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    lambda_min_clipped: Annotated[float, Field(allow_inf_nan=True)] = NEGATIVE_INFINITY
    variance_type: Literal["learned", "learned_range"] | None = None
    time_shift_type: Literal["exponential"] = "exponential"

    @model_validator(mode="after")
    def _consistent(self) -> DPMSettings:
        if not self.data and self.final_sigmas_type == "zero":
            raise ValueError(f"algorithm_type {self.algorithm_type} needs final_sigmas_type sigma_min")
        if not self.data and self.prediction_type == "flow_prediction":
            raise ValueError("prediction_type flow_prediction needs algorithm_type dpmsolver++ or sde-dpmsolver++")
        if self.algorithm_type == "sde-dpmsolver" and self.solver_order == 3:
            raise ValueError("algorithm_type sde-dpmsolver has solver_order 1 and 2")
        if self.use_flow_sigmas and self.respaced:
            raise ValueError("use_flow_sigmas goes without use_karras_sigmas and use_exponential_sigmas")
        return self

    @property
    def data(self) -> bool:
        """Whether the equation is about the clean sample."""
        return self.algorithm_type in ("dpmsolver++", "sde-dpmsolver++")

    @property
    def solver(self) -> Solver:
        """The equation that is solved."""
        return Solver(data=self.data, stochastic=self.algorithm_type.startswith("sde"))

    @property
    def conversion(self) -> Conversion:
        """How the network's output becomes what the equation is about."""
        limit = limiter(clip=None, threshold=self.threshold) if self.thresholding else None
        return Conversion(self.prediction_type, self.data, limit)

    def prediction_of(self, output: Array, channels: int) -> Array:
        """The output without the predicted variance that may follow it, which these solvers do not use."""
        return output if self.variance_type is None else output[:, :channels]
