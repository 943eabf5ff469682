"""What a dialect is: the inputs that a step of decoding needs, and the node that attends over the cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class Attention:
    """One call of a model's attention, as transformers' interface hands it over, with this layer's cache."""

    layer: int
    query: torch.Tensor  # [B, H, S, D]
    key: torch.Tensor  # [B, K, S, D]
    value: torch.Tensor  # [B, K, S, D]
    scale: float
    window: int | None
    """Positions that a query sees, itself included; None sees all."""
    rolling: bool
    """The cache holds the window only."""
    softcap: float | None
    sinks: torch.Tensor | None  # [H]
    past_key: torch.Tensor  # [B, K, C, D]
    past_value: torch.Tensor  # [B, K, C, D]
    cached: bool
    """The cache holds the new keys and values already: another layer appended them."""
    mask: torch.Tensor | None  # [B or 1, H or 1, S, C]
    """Added to the scores, where it is more than causal within the window; None otherwise."""


@dataclass(frozen=True, slots=True)
class StepInput:
    """A graph input of the dialect's own, besides token ids, positions and caches."""

    name: str
    dtype: torch.dtype
    axes: tuple[str, ...]


class AttentionNode(Protocol):
    """Emits the attention of one layer: the output [B, S, H, D], then the present key and value."""

    def __call__(
        self, attention: Attention, step: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...


class AppendNode(Protocol):
    """Emits a cache [B, K, C, D] with new keys or values [B, K, S, D] written behind each row's tokens."""

    def __call__(self, cache: torch.Tensor, new: torch.Tensor, step: Mapping[str, torch.Tensor]) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Dialect:
    """A way to write a decoder in ONNX."""

    name: str
    opset: int
    step_inputs: tuple[StepInput, ...]
    attend: AttentionNode
    append: AppendNode
    head_size_multiple: int | None
    """The attention operator wants one size for queries, keys and values, and a multiple of this; heads of other sizes
    are filled up with zeros. None takes them as they are."""
    static: bool = False
    """Caches have one length for ever, that of the context; windows are masks over it, nothing rolls."""
    in_place: bool = True
    """Past and present caches are the same memory."""
