"""How one trajectory is discretized: the options of `open_scheduler`."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, fields

from fmedge_runtimes.errors import RequestError


@dataclass(frozen=True, slots=True)
class StepOptions:
    """Options of a trajectory. Raises RequestError when a value is outside its range.

    Which of them a scheduler takes is in its row of the table; the others must stay at their defaults.
    """

    steps: int
    """Steps from pure noise to a clean sample; with a strength below 1 only the last of them are taken."""
    timesteps: tuple[float, ...] | None = None
    """The timesteps themselves, descending, one for each step."""
    sigmas: tuple[float, ...] | None = None
    """The noise levels themselves, descending, one for each step (Euler: and one more, where the last step ends)."""
    mu: float | None = None
    """Logarithm of the shift of the noise levels, where the config says use_dynamic_shifting."""
    strength: float = 1.0
    """For a trajectory that starts from an image: the part of the trajectory that is run, 1 being all of it."""
    eta: float = 0.0
    """DDIM: 0 is deterministic, 1 draws as much noise as DDPM."""
    original_steps: int | None = None
    """LCM: the steps of the schedule that the model was distilled with; None is the config's."""
    respaced: bool = False
    """LCM: spread all steps over the part that the strength leaves (its own image-to-image pipeline does), instead of
    leaving the first ones out."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise RequestError(f"steps is {self.steps}; it must be at least 1.")
        if not 0 < self.strength <= 1:
            raise RequestError(f"strength is {self.strength}; it must be above 0 and at most 1.")
        if not (math.isfinite(self.eta) and 0 <= self.eta <= 1):
            raise RequestError(f"eta is {self.eta}; it must be from 0 to 1.")
        if self.mu is not None and not math.isfinite(self.mu):
            raise RequestError(f"mu is {self.mu}; it must be finite.")
        if self.original_steps is not None and self.original_steps < 1:
            raise RequestError(f"original_steps is {self.original_steps}; it must be at least 1.")
        for name, given in (("timesteps", self.timesteps), ("sigmas", self.sigmas)):
            if given is None:
                continue
            if not all(math.isfinite(value) and value >= 0 for value in given):
                raise RequestError(f"{name} must be finite and not negative.")
            if any(after >= before for before, after in itertools.pairwise(given)):
                raise RequestError(f"{name} must be in descending order.")

    def check_taken(self, taken: frozenset[str], scheduler: str) -> None:
        """Raise RequestError when an option is set that a scheduler does not take."""
        always = {"steps", "strength"}
        for item in fields(self):
            if item.name not in taken | always and getattr(self, item.name) != item.default:
                more = f"; it takes {', '.join(sorted(taken | always))}"
                raise RequestError(f"{scheduler} takes no {item.name}{more}.")

    def check_length(self, name: str, given: tuple[float, ...], more: int = 0) -> None:
        """Raise RequestError unless there are `steps` values, and `more`."""
        if len(given) != self.steps + more:
            raise RequestError(f"{name} has {len(given)} values; {self.steps} steps need {self.steps + more}.")

    def first_step(self) -> int:
        """The step at which a trajectory of this strength starts. Raises RequestError when none is left.

        int(steps * strength) steps are run, as in diffusers' `get_timesteps` of the models with betas.
        """
        return self._checked(self.steps - min(int(self.steps * self.strength), self.steps))

    def first_flow_step(self) -> int:
        """`first_step` of flow matching, whose pipelines in diffusers round the other way."""
        return self._checked(int(self.steps - min(self.steps * self.strength, self.steps)))

    def _checked(self, first: int) -> int:
        if first >= self.steps:
            raise RequestError(
                f"strength {self.strength} leaves none of {self.steps} steps; "
                f"use at least {math.ceil(1 / self.strength)} steps, or a higher strength."
            )
        return first
