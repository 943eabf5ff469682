"""The dialect of TensorRT >= 10.3, which has none of the newer operators: matrix products, softmax, ScatterElements.

The cache is written by an ordinary operator. TensorRT promises nothing of an output that shares the memory of an input
then, so the present cache has memory of its own.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fmedge_converters.dialects.cache_positions import WRITE_INDICES, places
from fmedge_converters.dialects.dialect import Attention, Dialect
from fmedge_converters.dialects.tensorrt import attention_products


def attend(attention: Attention, step: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Append to the cache, then matrix products over it."""
    key, value = attention.past_key, attention.past_value
    if not attention.cached:
        key, value = append(key, attention.key, step), append(value, attention.value, step)
    return attention_products(attention, key, value, step), key, value


def append(cache: torch.Tensor, new: torch.Tensor, step: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The cache with the new tokens at their places, by ScatterElements."""
    index = places(step, new.shape[2])[:, None, :, None].expand(new.shape)  # [B, K, S, D]
    return cache.scatter(2, index, new)


TENSORRT_COMPAT = Dialect(
    name="tensorrt-compat",
    opset=21,
    step_inputs=(WRITE_INDICES,),
    attend=attend,
    append=append,
    head_size_multiple=None,
    static=True,
    in_place=False,
)
