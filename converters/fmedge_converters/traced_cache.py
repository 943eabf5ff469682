"""Stands in for transformers' cache while a model is traced.

Keys and values go to the active recording. A layer that attends through the attention interface gets its new keys and
values back as they are, since the operator appends them; a layer that attends in code of its own gets the whole
buffers, with its keys and values written at each row's position. Convolutions and recurrences get their states, which
start as zeros and therefore always exist.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from fmedge_runtimes.errors import SourceError
from transformers.cache_utils import Cache

from fmedge_converters.recording import LayerCache, Recording


class TracedCache(Cache):  # type: ignore[misc]  # transformers has no types for mypy here
    """A cache whose content is the inputs and outputs of a graph. The base class is transformers' own, because models
    ask for it by type."""

    def __init__(self, recording: Recording, layers: int) -> None:
        Cache.__init__(self, layers=[])  # a model's own class of cache may stand between
        self._recording = recording
        self._count = layers
        self._joined: list[_Joined] = []
        self._recurrent: torch.Tensor | None = None
        """What the running layer took, and how many of the states in it its kernels have got."""
        self._given = 0

    def __len__(self) -> int:
        return self._count

    @property
    def layers(self) -> list[object]:
        raise SourceError("the model keeps its past in cache layers of its own kind, which fmedge does not carry.")

    @layers.setter
    def layers(self, value: object) -> None:
        """The base class assigns an empty list, which has no use here."""

    # What models ask before they build masks. Every row may be anywhere in its buffer, so the past counts as long as
    # the buffer allows; positions come from position_ids.

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * self._count

    @property
    def is_linear(self) -> list[bool]:
        return [False] * self._count

    @property
    def is_dummy(self) -> list[bool]:
        return [False] * self._count

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return True

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return not self._recording.probing

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._recording.capacity - self._recording.positions.shape[1]

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self._recording.capacity

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._recording.capacity, 0

    # Keys and values

    def update(  # the signature is transformers'
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_args: object, **_kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        recording = self._recording
        if key_states.dim() != 4 or value_states.dim() != 4:
            raise SourceError(f"layer {layer_idx} caches keys and values in {key_states.dim()} dimensions, not in 4.")
        if recording.probing:
            if layer_idx in recording.appended:
                raise SourceError(f"layer {layer_idx} caches twice in one pass; fmedge keeps one cache for each layer.")
            batch, heads, _, key_dim = key_states.shape
            value_dim = value_states.shape[-1]
            recording.appended[layer_idx] = LayerCache(layer_idx, heads, key_dim, value_dim, None, rolling=False)
            capacity = recording.capacity
            key_states = key_states.new_zeros((batch, heads, capacity, key_dim))  # [B, K, C, D]
            value_states = value_states.new_zeros((batch, heads, capacity, value_dim))  # [B, K, C, D]
        elif layer_idx in recording.bypassing and recording.dialect is not None:
            key, value = recording.past[layer_idx]
            key_states = recording.dialect.append(key, key_states, recording.step)
            value_states = recording.dialect.append(value, value_states, recording.step)
            recording.present[layer_idx] = key_states, value_states
        recording.new.append((layer_idx, key_states, value_states))
        return key_states, value_states

    def update_indexer(self, indexer_key_states: torch.Tensor, layer_idx: int) -> torch.Tensor:
        raise SourceError(
            f"layer {layer_idx} chooses the tokens that it attends to by an index of its own (sparse attention), which "
            "fmedge does not carry."
        )

    # States of convolutions and recurrences

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self._recording.past_states.get(_name(layer_idx, "conv", state_idx))

    def update_conv_state(
        self,
        conv_states: torch.Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **_kwargs: object,
    ) -> torch.Tensor:
        """The kept columns, then the new ones [B, N, K + S]; keeps the last K of them."""
        name = _name(layer_idx, "conv", state_idx)
        width = conv_states.shape[-1] if conv_kernel_size is None else conv_kernel_size
        kept = self._recording.past_states.get(name)
        if kept is None:
            kept = conv_states.new_zeros((*conv_states.shape[:-1], width))
        joined = torch.cat([kept, conv_states], dim=-1)
        self._recording.present_states[name] = joined[..., -width:]
        self._joined.append(_Joined(name, joined, kept, conv_states))
        return joined

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        self._recurrent = self._recording.past_states.get(_name(layer_idx, "recurrent", state_idx))
        self._given = 0
        return self._recurrent

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **_kwargs: object
    ) -> torch.Tensor:
        self._recording.present_states[_name(layer_idx, "recurrent", state_idx)] = recurrent_states
        return recurrent_states

    # What kernels ask (kernels/states.py)

    def split(self, joined: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        found = next((item for item in self._joined if item.joined is joined), None)
        if found is None or found.kept.shape[-1] < columns:
            return None
        return found.kept[..., found.kept.shape[-1] - columns :], found.new

    def keep(self, joined: torch.Tensor, columns: torch.Tensor) -> None:
        name = next(item.name for item in self._joined if item.joined is joined)
        self._recording.present_states[name] = columns

    def recurrent(self, axes: int) -> torch.Tensor | None:
        if self._recurrent is None or self._recurrent.dim() == axes:
            return self._recurrent
        self._given += 1
        return self._recurrent[:, self._given - 1]


@dataclass(frozen=True, slots=True)
class _Joined:
    """The columns of a convolution as a model got them."""

    name: str
    joined: torch.Tensor  # [B, N, K + S]
    kept: torch.Tensor  # [B, N, K]
    new: torch.Tensor  # [B, N, S]


def _name(layer: int, kind: str, index: int) -> str:
    return f"{layer}.{kind}" if index == 0 else f"{layer}.{kind}.{index}"
