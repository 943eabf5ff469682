"""What images are conditioned on: inputs of a denoiser, one record for each job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fmedge_runtimes.pipelines.pipeline import Array
from fmedge_runtimes.pipelines.trajectory import stacked


@dataclass(frozen=True, slots=True)
class Condition:
    """What one job's image is conditioned on: inputs of the denoiser without their row axis."""

    positive: Mapping[str, Array]
    negative: Mapping[str, Array] | None
    """The same inputs for the other half of guidance; None: no guidance."""

    @property
    def alike(self) -> object:
        """Equal for jobs that can share a batch."""
        return tuple(value.shape for value in self.positive.values())

    def and_also(self, inputs: Mapping[str, Array]) -> Condition:
        """The same with more inputs, which both halves are given."""
        negative = None if self.negative is None else {**self.negative, **inputs}
        return Condition({**self.positive, **inputs}, negative)


def together(each: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """The inputs of a batch [B, ...] by name."""
    return {name: stacked([one[name] for one in each], range(len(each))) for name in each[0]}
