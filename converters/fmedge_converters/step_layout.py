"""What the layers of a model keep from step to step, and how they attend: found by running the model once."""

from __future__ import annotations

from dataclasses import dataclass

from fmedge_converters.own_past import OwnPast
from fmedge_converters.recording import LayerCache, LayerState


@dataclass(frozen=True, slots=True)
class Layout:
    """What decides the inputs and outputs of a step."""

    caches: tuple[LayerCache, ...]
    states: tuple[LayerState, ...]
    bypassing: frozenset[int]
    """Layers that need their whole cache in hand."""
    masked: frozenset[int]
    """Layers that attend behind a mask of their own."""
    one_token: bool
    """A step takes one token of each row."""
    own: OwnPast | None
    """Where a model keeps its past if not in the cache that it is given."""
