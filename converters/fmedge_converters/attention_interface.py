"""The attention function that stands in for transformers' own while a model is traced.

A layer behind a plain causal mask, with or without a window, becomes the dialect's operator; any other becomes plain
matrix products over the cache, with the model's mask.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from fmedge_runtimes.errors import SourceError
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fmedge_converters.dialects.dialect import Attention
from fmedge_converters.masked_attention import masked_attention
from fmedge_converters.masks import make_mask
from fmedge_converters.recording import LayerCache, Recording, active

IMPLEMENTATION = "eager"
"""Every model of transformers can be built with it; while a model is traced its functions are ours."""


@contextlib.contextmanager
def replaced_attention() -> Iterator[None]:
    """Let models that are built with IMPLEMENTATION call `attend` and `make_mask`."""
    ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION] = attend
    ALL_MASK_ATTENTION_FUNCTIONS[IMPLEMENTATION] = make_mask
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION]
        del ALL_MASK_ATTENTION_FUNCTIONS[IMPLEMENTATION]


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,  # [B, H, S, D]
    key: torch.Tensor,  # [B, K, S, D]
    value: torch.Tensor,  # [B, K, S, D]
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    **_others: Any,  # noqa: ANN401 - transformers hands over what the model got; the parity check judges the result
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls; its signature is theirs. Returns [B, S, H, D]."""
    recording = active()
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if attention_mask is None and not causal:
        raise SourceError("the model attends to later tokens too: it is an encoder, not a decoder.")
    if position_bias is not None:
        raise SourceError("the model adds a bias to its scores that takes all rows of a batch to be equally long.")
    source = recording.source_of(key)
    layer = getattr(module, "layer_idx", None) if source is None else source[0]
    if not isinstance(layer, int):
        raise SourceError("the model's attention layers have no layer_idx, so their caches cannot be told apart.")
    if recording.probing:
        if source is not None and source[1] is not value:
            recording.bypassing.add(layer)
        _look(recording, layer, key, value, attention_mask, sliding_window)
        batch, heads, length, _ = query.shape
        return query.new_zeros((batch, length, heads, value.shape[-1])), None
    scale = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
    if layer in recording.bypassing:
        if attention_mask is None:
            raise SourceError(f"layer {layer} attends to its whole cache without a mask.")
        return masked_attention(query, key, value, attention_mask, scale, softcap, s_aux), None
    cached = layer in recording.present
    past_key, past_value = recording.present[layer] if cached else recording.past[layer]
    cache = recording.attended[layer]
    attention = Attention(
        layer=layer,
        query=query,
        key=key,
        value=value,
        scale=scale,
        window=cache.window,
        rolling=cache.rolling,
        softcap=softcap,
        sinks=s_aux,
        past_key=past_key,
        past_value=past_value,
        cached=cached,
        mask=attention_mask if layer in recording.masked else None,
    )
    if recording.dialect is None:
        raise RuntimeError("a traced pass has a dialect")
    output, present_key, present_value = recording.dialect.attend(attention, recording.step)
    recording.present[layer] = present_key, present_value
    return output, None  # [B, S, H, D]


def _look(
    recording: Recording,
    layer: int,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    sliding_window: int | None,
) -> None:
    """Note what a layer asks for."""
    mask = None if attention_mask is None else recording.mask_of(attention_mask)
    if attention_mask is not None and (mask is None or not mask.plain):
        recording.masked.add(layer)
    window = mask.window if mask is not None else sliding_window
    before = recording.attended.get(layer)
    if before is not None and (before.window != window or layer not in recording.appended):
        raise SourceError(f"layer {layer} attends twice in one pass; fmedge keeps one cache for each layer.")
    recording.attended[layer] = LayerCache(layer, key.shape[1], key.shape[3], value.shape[3], window, rolling=False)
