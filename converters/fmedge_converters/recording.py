"""What one forward pass of a model asks of its attention and its cache, and what it leaves behind.

A model runs twice on fake tensors. The first pass looks: which layers attend, over heads of which sizes, behind which
masks; which of them keep a recurrent state, of which shape. The second pass is traced: its caches and states are
graph inputs, and what becomes of them are graph outputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from fmedge_converters.dialects.dialect import Dialect

PROBE_CAPACITY = 32
"""Length of the caches while a model is only looked at; unlike every other size of the example."""


@dataclass(frozen=True, slots=True)
class LayerCache:
    """What one layer keeps of each token."""

    layer: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None
    """Positions that a query sees, itself included; None sees all."""
    rolling: bool
    """The buffer holds the window only."""
    capacity: int | None = None
    """Positions that the buffer always has; None: as many as the runtime likes."""
    in_place: bool = True
    """Past and present are the same memory."""


@dataclass(frozen=True, slots=True)
class LayerState:
    """What a recurrent layer keeps of a row: a tensor [B, *shape]."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    in_place: bool
    """The graph may write the new state over the old one."""


@dataclass(frozen=True, slots=True)
class Mask:
    """A mask that was made for a model, and what it means."""

    tensor: torch.Tensor  # [B, 1, S, C], added to the scores
    plain: bool
    """Causal, and nothing else but a window: an operator can make it itself."""
    window: int | None


@dataclass(slots=True)
class Recording:
    """The state of one pass. Without a dialect the pass only looks."""

    positions: torch.Tensor  # [B, S]
    dialect: Dialect | None = None
    step: Mapping[str, torch.Tensor] = field(default_factory=dict)
    past: Mapping[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)  # [B, K, C, D] each
    past_states: Mapping[str, torch.Tensor] = field(default_factory=dict)  # [B, *shape]
    attended: dict[int, LayerCache] = field(default_factory=dict)
    """Layers that attend through transformers' attention interface."""
    appended: dict[int, LayerCache] = field(default_factory=dict)
    """Layers that append to the cache; those that do not attend through the interface do it in code of their own."""
    present: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    present_states: dict[str, torch.Tensor] = field(default_factory=dict)
    masked: set[int] = field(default_factory=set)
    """Layers that attend behind a mask which is neither causal nor a window."""
    masks: list[Mask] = field(default_factory=list)
    new: list[tuple[int, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    """Layer, new keys and new values, in the order in which they were appended."""
    bypassing: set[int] = field(default_factory=set)
    """Layers that need their whole cache in hand: their attention is the model's own code, or attends to something
    that was made of the cached values."""

    @property
    def probing(self) -> bool:
        """Whether this pass only looks."""
        return self.dialect is None

    @property
    def capacity(self) -> int:
        """Length C of the caches that are not rolling, symbolic while tracing; the step's own where there are none."""
        if self.probing:
            return PROBE_CAPACITY
        whole = (key for layer, (key, _) in self.past.items() if not self._rolling(layer))
        cache = next(whole, None)
        return self.positions.shape[1] if cache is None else cache.shape[2]

    def _rolling(self, layer: int) -> bool:
        return layer in self.attended and self.attended[layer].rolling

    def mask_of(self, tensor: torch.Tensor) -> Mask | None:
        """The mask that a tensor is, if a model handed it on as it was made."""
        return next((mask for mask in self.masks if mask.tensor is tensor), None)

    def source_of(self, key: torch.Tensor) -> tuple[int, torch.Tensor] | None:
        """The layer that appended these very keys, and the values that it appended with them."""
        return next(((layer, value) for layer, new, value in self.new if new is key), None)


_active: Recording | None = None


def active() -> Recording:
    """The recording of the pass that runs now."""
    if _active is None:
        raise RuntimeError("the fmedge attention and cache are for tracing only")
    return _active


@contextlib.contextmanager
def recording(current: Recording) -> Iterator[None]:
    """Make a recording the active one."""
    global _active  # noqa: PLW0603 - transformers' interfaces have no other way to reach their caller
    _active = current
    try:
        yield
    finally:
        _active = None


MaskFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""transformers' masks: (batch, head, query position, key position) -> whether the query sees the key."""
