"""How far a training run is, and the learning rate that belongs to it.

A run ends after a number of steps or after a time. Both are one fraction, from 0 to 1, that the
learning rate follows: up over the first part, then down to zero at the end, whenever that is.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from fmedge_runtimes.errors import TrainingError

WARMUP = 0.05
WARMUP_START = 0.1
"""Of the full rate; not zero, so that the first step already counts."""


@dataclass(frozen=True, slots=True)
class Budget:
    """How long to train: steps or minutes, one of them."""

    steps: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        """Refuse budgets that are no budget."""
        if (self.steps is None) == (self.minutes is None):
            raise TrainingError("say how long to train: either --minutes or --steps")
        if self.steps is not None and self.steps < 1:
            raise TrainingError(f"--steps must be at least 1, not {self.steps}")
        if self.minutes is not None and not 0 < self.minutes < float("inf"):
            raise TrainingError(f"--minutes must be more than 0, not {self.minutes}")

    def fraction(self, steps: int, seconds: float) -> float:
        """How much of the budget is used, at most 1."""
        if self.steps is not None:
            return min(steps / self.steps, 1.0)
        assert self.minutes is not None
        return min(seconds / (self.minutes * 60), 1.0)


@dataclass(frozen=True, slots=True)
class CheckpointInterval:
    """When to write a checkpoint: whichever comes first."""

    minutes: float
    steps: int | None


def learning_rate_factor(fraction: float) -> float:
    """The share of the full learning rate: linear up over WARMUP, linear down to 0 at the end."""
    if fraction < WARMUP:
        return WARMUP_START + (1 - WARMUP_START) * fraction / WARMUP
    return (1 - fraction) / (1 - WARMUP)


@dataclass(slots=True)
class Stopwatch:
    """The training time, across interruptions: it goes on from the seconds of the last checkpoint."""

    before: float = 0.0
    started: float = field(default_factory=time.monotonic)

    def start(self) -> None:
        """Count from now on."""
        self.started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Training time until now, earlier parts of the run included."""
        return self.before + time.monotonic() - self.started
