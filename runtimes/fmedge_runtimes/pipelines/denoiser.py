"""A denoiser graph with its conditions and guidance, for one batch: (sample, timestep, step) -> prediction.

    denoiser = Denoiser(part, UNET, conditions, guidance=7.5)
    prediction = denoiser(sample, timestep, index)

Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598) runs the graph for the conditions and for the negative
ones, as one batch of twice the rows or as two calls. Sample and prediction are copied in and out of buffers that nobody
else sees: a graph that writes its output where a scheduler's sample lies would make wrong images without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from fmedge_runtimes.parts import Part, check_finite
from fmedge_runtimes.pipelines.control import Residuals
from fmedge_runtimes.pipelines.pipeline import Array


@dataclass(frozen=True, slots=True)
class Form:
    """How a denoiser's graph is fed: one record for each kind of module."""

    sample: str
    """Input [B, C, ...]."""
    output: str
    """Output [B, C or 2 C, ...]."""
    timestep: str = "timestep"
    timestep_rows: bool = False
    """Whether the timestep comes once for each row [B], instead of once [1]."""
    timestep_of: Callable[[np.float32], np.float32] = np.float32
    """What the module is told of a scheduler's timestep."""
    constants: tuple[str, ...] = ()
    """Outputs that depend on no input: parameters of the module that its pipeline uses by itself."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """What a batch is conditioned on."""

    positive: Mapping[str, Array]
    """Inputs [B, ...] by name."""
    negative: Mapping[str, Array] | None = None
    """The same inputs for the other half of guidance; None: no guidance."""
    shared: Mapping[str, Array] = field(default_factory=dict)
    """Inputs without a row axis."""
    channels: Array | None = None
    """Channels [B, C, ...] behind those of the sample, the same at every step: mask, masked image, low resolution."""


class Denoiser:
    """Not for several threads at once."""

    def __init__(
        self,
        part: Part,
        form: Form,
        conditions: Conditions,
        *,
        guidance: float = 1.0,
        rescale: float = 0.0,
        split: bool = False,
        guided_channels: int | None = None,
        residuals: Residuals | None = None,
    ) -> None:
        """`guided_channels` of the prediction are guided, the others (a learned variance) are the conditional ones.
        `residuals` are what ControlNets give."""
        self._part, self._form = part, form
        self._guidance = np.float32(guidance)
        self._rescale = np.float32(rescale)
        self._guided = guided_channels
        self._residuals = residuals
        self._extra = conditions.channels
        halves = [conditions.positive]
        if conditions.negative is not None:
            halves.insert(0, conditions.negative)  # diffusers' order; for the same rounding
        self._halves = len(halves)
        calls = halves if split else [_stacked(halves)]
        self._feeds: list[dict[str, Array]] = [{**conditions.shared, **call} for call in calls]
        self._sample: Array | None = None
        self._output: Array | None = None
        self.constants: dict[str, Array] = {}
        """Known behind the first run."""

    def __call__(self, sample: Array, timestep: float, index: int) -> Array:
        """The prediction for a sample [B, C, ...] in the step `index`, in an array of its own. Raises BackendError."""
        rows = len(sample) * self._halves // len(self._feeds)
        feed = self._fill(sample, rows)
        steps = np.full(
            rows if self._form.timestep_rows else 1, self._form.timestep_of(np.float32(timestep))
        )  # [R] or [1]
        outputs = []
        for number, conditions in enumerate(self._feeds):
            given = {**conditions, self._form.sample: feed, self._form.timestep: steps}
            if self._residuals is not None:
                given |= self._residuals(given, self._form.sample, number, len(self._feeds), index)
            outputs.append(self._run(given, number))
        if self._halves == 1:
            alone: Array = outputs[0].astype(np.float32)  # a copy
            return alone
        negative, positive = outputs if len(outputs) == 2 else np.split(outputs[0], 2)  # [B, C, ...] each
        return self._guide(negative, positive)

    def _fill(self, sample: Array, rows: int) -> Array:
        """The graph's input [R, C + extra, ...], in this denoiser's own buffer."""
        channels = sample.shape[1]
        if self._sample is None:
            more = 0 if self._extra is None else self._extra.shape[1]
            dtype = self._part.input(self._form.sample).dtype
            self._sample = np.empty((rows, channels + more, *sample.shape[2:]), dtype)
        for start in range(0, rows, len(sample)):
            half = self._sample[start : start + len(sample)]
            half[:, :channels] = sample
            if self._extra is not None:
                half[:, channels:] = self._extra
        return self._sample

    def _run(self, given: Mapping[str, Array], number: int) -> Array:
        """The output [R, ...], in this denoiser's own buffer; its shape is known behind the first run."""
        name = self._form.output
        if self._output is None:
            outputs = self._part.run(given)
            output = self._part.output(name, outputs)
            self.constants = {wanted: self._part.output(wanted, outputs) for wanted in self._form.constants}
            self._output = np.empty((len(self._feeds), *output.shape), output.dtype)
            self._output[number] = output
        else:
            self._part.run(given, {name: self._output[number]})
            check_finite(self._part.name, self._output[number])
        found: Array = self._output[number]
        return found

    def _guide(self, negative: Array, positive: Array) -> Array:
        count = self._guided or positive.shape[1]
        guided: Array = positive.astype(np.float32)  # a copy
        toward, away = guided[:, :count], negative[:, :count].astype(np.float32, copy=False)
        axes = tuple(range(1, positive.ndim))
        before = toward.std(axis=axes, ddof=1, keepdims=True) if self._rescale > 0 else None
        toward -= away
        toward *= self._guidance
        toward += away
        if before is not None:
            # Lin et al. 2023, arXiv 2305.08891, section 3.4.
            after = toward.std(axis=axes, ddof=1, keepdims=True)
            plain = toward * (before / after)
            toward *= np.float32(1) - self._rescale
            toward += self._rescale * plain
        return guided


def _stacked(halves: list[Mapping[str, Array]]) -> Mapping[str, Array]:
    if len(halves) == 1:
        return halves[0]
    return {name: np.concatenate([half[name] for half in halves]) for name in halves[0]}
