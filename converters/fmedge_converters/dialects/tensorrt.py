"""The dialect of TensorRT >= 10.15: TensorScatter into a static cache, and ONNX's Attention (opset 24) behind a mask.

The mask is always there, made from positions. TensorRT's parser ignores Attention's `nonpad_kv_seqlen` without a word,
and its `is_causal` counts from the upper left, which is wrong behind a cache. The attribute `softcap` and sinks are not
in it, heads of sizes beside HEADS, and of two sizes for keys and values, have no kernel: all these are matrix products.
Operators: https://onnx.ai/onnx/operators/onnx__Attention.html, https://onnx.ai/onnx/operators/onnx__TensorScatter.html
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fmedge_converters.dialects.cache_positions import WRITE_INDICES, added_mask, visible
from fmedge_converters.dialects.dialect import Attention, Dialect
from fmedge_converters.masked_attention import masked_attention

HEADS = range(16, 257, 8)
"""Sizes of heads for which TensorRT has a kernel: TensorRT-RTX 1.7.1 refuses 8, 12, 20 and 512."""


def attend(attention: Attention, step: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Append to the cache, then one node where it can say what is asked for, matrix products elsewhere."""
    key, value = attention.past_key, attention.past_value
    if not attention.cached:
        key, value = append(key, attention.key, step), append(value, attention.value, step)
    return (attention_node if _is_plain(attention) else attention_products)(attention, key, value, step), key, value


def _is_plain(attention: Attention) -> bool:
    plain = attention.mask is None and attention.softcap is None and attention.sinks is None
    return plain and has_kernel(attention.query, attention.value)


def has_kernel(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether TensorRT has one for heads of these sizes."""
    size = query.shape[3]
    return size == value.shape[3] and size in HEADS


def attention_node(
    attention: Attention, key: torch.Tensor, value: torch.Tensor, step: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Emit Attention over the whole cache. Returns [B, S, H, D]."""
    query = attention.query
    seen = visible(step, query.shape[2], key.shape[2], attention.window)
    output: torch.Tensor = torch.onnx.ops.symbolic(
        "Attention",
        [query, key, value, seen],
        attrs={"scale": attention.scale},
        dtype=query.dtype,
        shape=query.shape,
        version=24,
    )
    return output.transpose(1, 2)


def attention_products(
    attention: Attention, key: torch.Tensor, value: torch.Tensor, step: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """The same in matrix products and softmax, with all that a model may ask for. Returns [B, S, H, E]."""
    query, mask = attention.query, attention.mask
    if mask is None:
        mask = added_mask(visible(step, query.shape[2], key.shape[2], attention.window), query.dtype)
    # Scaled first: the sums of products of large heads stay in fp16's range.
    scaled = query * attention.scale
    return masked_attention(scaled, key, value, mask, 1.0, attention.softcap, attention.sinks)


def append(cache: torch.Tensor, new: torch.Tensor, step: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Emit TensorScatter along the cache's axis of tokens."""
    written: torch.Tensor = torch.onnx.ops.symbolic(
        "TensorScatter",
        [cache, new, step[WRITE_INDICES.name]],
        attrs={"axis": 2},
        dtype=cache.dtype,
        shape=cache.shape,
        version=24,
    )
    return written


TENSORRT = Dialect(
    name="tensorrt",
    opset=24,
    step_inputs=(WRITE_INDICES,),
    attend=attend,
    append=append,
    head_size_multiple=None,
    static=True,
)
