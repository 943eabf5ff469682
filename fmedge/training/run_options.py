"""The options that runs have in common: what they may be, and which decide the result, so that a resumed run must have
the same."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmedge_runtimes.errors import TrainingError

if TYPE_CHECKING:
    from fmedge.training.image import ImageTraining
    from fmedge.training.text import TextTraining

FREE_TO_CHANGE = ("output", "resume", "force", "checkpoint_minutes", "checkpoint_steps", "sample_minutes")
"""The options that a resumed run may change, because they change nothing of its result."""


def check_options(options: TextTraining | ImageTraining, least: Mapping[str, int]) -> None:
    """Raise TrainingError for numbers that no run can use; `least` are bounds of options that only some runs have."""
    for name, bound in {**least, "batch": 1, "checkpoint_steps": 1}.items():
        value = getattr(options, name)
        if value is not None and value < bound:
            raise TrainingError(f"--{name.replace('_', '-')} must be at least {bound}, not {value}")
    for name in ("learning_rate", "checkpoint_minutes"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise TrainingError(f"--{name.replace('_', '-')} must be more than 0, not {value}")
    if not 0 <= options.seed < 2**32:
        raise TrainingError(f"--seed must be from 0 to {2**32 - 1}, not {options.seed}")


def deciding_options(options: TextTraining | ImageTraining) -> dict[str, Any]:
    """Those that decide the result, as JSON has them."""
    deciding = {
        name: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(options).items()
        if name not in FREE_TO_CHANGE
    }
    return {**deciding, "processes": int(os.environ.get("WORLD_SIZE", "1"))}


def refuse_other_options(work: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise TrainingError if a run was begun with other options."""
    changes = [f"{name} was {before.get(name)}, is {now[name]}" for name in now if before.get(name) != now[name]]
    if changes:
        raise TrainingError(
            f"{work}: was begun with other options ({'; '.join(changes)}): resume it with the same, "
            "or discard it with --force"
        )
