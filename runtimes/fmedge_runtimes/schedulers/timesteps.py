"""Which of the training timesteps a trajectory visits (Lin et al. 2023, arXiv 2305.08891, table 2)."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from fmedge_runtimes.errors import RequestError
from fmedge_runtimes.schedulers.scheduler import Numbers

Spacing = Literal["linspace", "leading", "trailing"]


def spaced(spacing: Spacing, train: int, count: int, offset: int) -> Numbers:
    """`count` of `train` timesteps, descending, float64 [count]: not rounded for linspace, whole numbers otherwise.

    Raises RequestError when there are more steps than training timesteps.
    """
    check_count(train, count)
    if spacing == "linspace":
        return np.linspace(0, train - 1, count)[::-1]
    if spacing == "leading":
        return np.arange(count, dtype=np.float64)[::-1] * (train // count) + offset
    return _trailing(train, train, count)


def spaced_between(spacing: Spacing, train: int, last: int, count: int, offset: int) -> npt.NDArray[np.int64]:
    """`count` timesteps below `last`, descending, int64: for solvers that end one interval above timestep 0."""
    check_count(train, count)
    if spacing == "trailing":
        return _trailing(train, last, count).astype(np.int64)
    if spacing == "linspace":
        return np.round(np.linspace(0, last - 1, count + 1)).astype(np.int64)[:0:-1]
    if last < count + 1:
        raise RequestError(
            f"{count} steps with timestep_spacing leading need {count + 1} timesteps, not {last}; use fewer."
        )
    return np.arange(count, 0, -1, dtype=np.int64) * (last // (count + 1)) + offset


def _trailing(train: int, last: int, count: int) -> Numbers:
    # Rounding can make arange one longer; diffusers then takes one more step, at timestep -1, which no model knows.
    return np.round(np.arange(last, 0, -train / count)[:count]) - 1


def whole(timesteps: Numbers) -> npt.NDArray[np.int64]:
    """Rounded, int64."""
    return np.round(timesteps).astype(np.int64)


def check_count(train: int, count: int) -> None:
    """Raise RequestError when a trajectory has more steps than the model was trained with."""
    if count > train:
        raise RequestError(f"{count} steps exceed the {train} timesteps that the model was trained with; use fewer.")


def check_in_table(timesteps: Numbers, size: int) -> None:
    """Raise RequestError when a timestep is outside the training timesteps."""
    if not timesteps.size:
        raise RequestError("lambda_min_clipped leaves no timesteps; use another config.")
    worst = timesteps.max()
    if worst >= size or timesteps.min() < 0:
        bad = worst if worst >= size else timesteps.min()
        raise RequestError(
            f"timestep {bad} is outside the {size} timesteps that the model was trained with; "
            "use fewer steps, or another timestep_spacing or steps_offset."
        )
