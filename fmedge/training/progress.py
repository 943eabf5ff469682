"""What a training run tells while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Phase = Literal["reading", "tokenizing", "measuring", "training", "writing"]


@dataclass(frozen=True, slots=True)
class Progress:
    """A moment of a training run; all but the phase belong to "training"."""

    phase: Phase
    fraction: float = 0.0
    """Of the steps or of the minutes."""
    step: int = 0
    seconds: float = 0.0
    rate: float = 0.0
    """Tokens or pictures per second, over the whole run until now."""
    loss: float | None = None
    """The mean over the last steps; None until there are some."""


Report = Callable[[Progress], None]
"""What receives a run's progress. It is called in the thread that trains."""


def no_report(progress: Progress) -> None:
    """Receive a run's progress and do nothing with it."""
