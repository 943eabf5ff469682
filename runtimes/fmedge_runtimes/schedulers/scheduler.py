"""What every scheduler does: one trajectory from noise to a sample, for a batch.

    scheduler = open_scheduler(read_config(path), steps=20)
    sample = noise * scheduler.init_noise_sigma
    for index, timestep in enumerate(scheduler.timesteps):
        output = denoiser(scheduler.scale(sample, index), timestep)
        sample = scheduler.step(output, index, sample, draw).sample

Steps are taken in order, once each: solvers of higher order remember earlier outputs. A scheduler therefore serves one
batch; opening another one costs microseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Numbers = npt.NDArray[Any]
"""float64 where a table is made, as diffusers makes it; float32 once it is used."""
Scalar = np.floating[Any] | float

Draw = Callable[[], Array]
"""Fresh unit normal noise of the sample's shape [B, ...], each row from its own generator."""


@dataclass(frozen=True, slots=True)
class Step:
    """What a step gives; neither array is one that was passed in and changed."""

    sample: Array
    """The sample of the next timestep, float32 [B, ...]."""
    denoised: Array | None
    """The clean sample as predicted at this step, float32 [B, ...], for previews."""


class Scheduler(Protocol):
    """One trajectory of a batch; what is remembered between steps lives here."""

    @property
    def timesteps(self) -> Numbers:
        """The timesteps that the denoiser is given, int64 or float32 [N]; N may exceed the number of steps."""

    @property
    def init_noise_sigma(self) -> float:
        """What unit normal noise is multiplied with to start a trajectory from noise alone."""

    def scale(self, sample: Array, index: int) -> Array:
        """The denoiser's input: the sample, scaled where the formulation asks for it. [B, ...]."""

    def step(self, output: Array, index: int, sample: Array, draw: Draw) -> Step:
        """Go from timestep `index` to the next.

        `output` [B, ...] is the denoiser's, after guidance, `sample` [B, ...] is unscaled; both float32. `draw` is
        called as often as diffusers draws: never by a deterministic scheduler.
        """

    def add_noise(self, original: Array, noise: Array, index: int) -> Array:
        """The clean sample with the noise of timestep `index`: where a trajectory of an image starts. [B, ...]."""


def combine(*terms: tuple[Scalar, Array]) -> Array:
    """The sum of scalar * array, float32, in a new array; terms whose scalar is 0 are left out."""
    total: Array | None = None
    own = False
    for scalar, array in terms:
        if scalar == 0:
            continue
        part = array if scalar == 1 else array * np.float32(scalar)
        if total is None:
            total, own = part, scalar != 1
        elif own:
            total += part
        elif scalar == 1:
            total, own = total + part, True
        else:
            part += total
            total, own = part, True
    if total is None:
        return np.zeros_like(terms[0][1])
    return total if own else total.copy()
