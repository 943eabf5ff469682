"""What a scheme is: two functions that spell a graph's weights, and what a person should know of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from fmedge_runtimes.manifest import Evidence

from fmedge_converters.calibration.calibration import Calibration, Report
from fmedge_converters.graph import DecoderGraph
from fmedge_converters.passes.convolution import Convolution
from fmedge_converters.passes.linear import Linear
from fmedge_converters.passes.lookup import Lookup
from fmedge_converters.passes.mixture import Mixture
from fmedge_converters.rounding import Rounding
from fmedge_converters.weight import PackedMatrix, Weight


class SpellLinear(Protocol):
    """Replaces a Linear node by operators that the target runs."""

    def __call__(self, graph: DecoderGraph, linear: Linear, *, is_head: bool, block_size: int) -> None: ...


class SpellEmbedding(Protocol):
    """Replaces the lookup of the embedding; `tied` if the head has the same weight."""

    def __call__(self, graph: DecoderGraph, embedding: Lookup, *, tied: bool, block_size: int) -> None: ...


class SpellMixture(Protocol):
    """Replaces a mixture of experts by the target's kernel; leaves one that the kernel cannot compute as it is."""

    def __call__(self, graph: DecoderGraph, mixture: Mixture, *, block_size: int) -> None: ...


class SpellConvolution(Protocol):
    """Replaces a Conv node by operators that the target runs."""

    def __call__(self, graph: DecoderGraph, convolution: Convolution) -> None: ...


class RoundsWeight(Protocol):
    """How a scheme rounds a matrix [N, K] in blocks."""

    def __call__(self, weight: Weight, *, is_head: bool, block_size: int) -> Rounding: ...


class Keeps(Protocol):
    """The codes that a matrix [N, K], or matrices [E, N, K], keep of their source; None if they are to be rounded."""

    def __call__(self, weight: Weight) -> PackedMatrix | None: ...


@dataclass(frozen=True, slots=True)
class WeightOptions:
    """What a person may want otherwise of a scheme that rounds in blocks."""

    symmetric: bool = True
    """False gives each block a zero point of its own."""
    head_bits: int | None = None
    """Of the head and the token embedding; None: as the scheme has it."""


USUAL = WeightOptions()


class Calibrate(Protocol):
    """Fits a graph's weights to calibration text, before they are spelled; returns what was done."""

    def __call__(
        self,
        graph: DecoderGraph,
        calibration: Calibration,
        rounding: Callable[[Weight], Rounding] | None,
        report: Report,
    ) -> Evidence: ...


@dataclass(frozen=True, slots=True)
class Scheme:
    """A row of a target's table of quantizations."""

    name: str
    summary: str
    bits: int
    """Bits of a weight of the layers."""
    linear: SpellLinear
    embedding: SpellEmbedding
    block_size: int
    """Weights that share a scale unless --block-size says otherwise; 0 for a scheme without blocks."""
    mixture: SpellMixture | None = None
    """None leaves every mixture in its plain form, in which each expert's matrices are Linears of their own."""
    convolution: SpellConvolution | None = None
    """None leaves convolutions as they are."""
    storage: np.dtype[np.generic] | None = None
    """The type that weights have in the file, if it is not the one that is computed with."""
    keeps: Keeps | None = None
    """Which codes of a source that is quantized already are written as they are; None: none."""
    rounding: RoundsWeight | None = None
    """None for a scheme without blocks."""
    lookup_bits: int | None = None
    """Of a number of the token embedding, where that stays floating beside the head; None: it is rounded like that."""
    choices: tuple[Rounding, ...] = ()
    """What a matrix may become with a budget of bits; none: what mixed_precision.py has."""
    vary: Callable[[WeightOptions], Scheme] | None = None
    """The same scheme with other options; None if it has none."""
    calibrate: Calibrate | None = None
    """What is made of calibration text; None: nothing, so that there is none."""
    needs_calibration: bool = False
    """Whether the scheme is another one without it; calibration text that is not given is the built-in one then."""
