"""Stands in for transformers' cache while a model is traced.

Keys and values go to the active recording. A layer that attends through the attention interface gets its new keys and
values back as they are, since the operator appends them; a layer that attends in code of its own gets the whole
buffers, with its keys and values written at each row's position. Convolutions and recurrences get their states, which
start as zeros and therefore always exist.
"""

from __future__ import annotations

import torch
from fmedge_runtimes.errors import SourceError
from transformers.cache_utils import Cache

from fmedge_converters.recording import LayerCache, Recording


class TracedCache(Cache):  # type: ignore[misc]  # transformers has no types for mypy here
    """A cache whose content is the inputs and outputs of a graph. The base class is transformers' own, because models
    ask for it by type."""

    def __init__(self, recording: Recording, layers: int) -> None:
        super().__init__(layers=[])
        self._recording = recording
        self._count = layers

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

    # Recurrent states

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self._recording.past_states.get(_name(layer_idx, "conv", state_idx))

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: object
    ) -> torch.Tensor:
        """The columns before the new ones, then the new ones [B, N, k - 1 + S]; keeps the last k - 1 of them."""
        kernel = kwargs.get("conv_kernel_size")
        name = _name(layer_idx, "conv", state_idx)
        if not isinstance(kernel, int):
            raise SourceError(f"layer {layer_idx} does not say how long its convolution is.")
        keep = max(kernel - 1, 1)
        recording = self._recording
        if recording.probing:
            recording.present_states[name] = conv_states.new_zeros((*conv_states.shape[:-1], keep))
            return conv_states
        whole = torch.cat([recording.past_states[name], conv_states], dim=-1)
        recording.present_states[name] = whole[..., -keep:]
        return whole

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self._recording.past_states.get(_name(layer_idx, "recurrent", state_idx))

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **_kwargs: object
    ) -> torch.Tensor:
        self._recording.present_states[_name(layer_idx, "recurrent", state_idx)] = recurrent_states
        return recurrent_states


def _name(layer: int, kind: str, index: int) -> str:
    return f"{layer}.{kind}" if index == 0 else f"{layer}.{kind}.{index}"
