"""The dialect of ONNX Runtime: com.microsoft::GroupQueryAttention over an in-place cache [B, K, C, D].

`seqlens_k[b]` is the number of cached tokens of row b after this step, minus one; new keys and values are written
behind the cached ones. `total_sequence_length` is the largest such number plus one. What that operator does not
express is written with TensorScatter (opset 24) and plain matrix products.
Operator: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fmedge_converters.dialects.dialect import Attention, Dialect, StepInput
from fmedge_converters.masked_attention import masked_attention

Attributes = dict[str, int | float | str | bool | Sequence[int] | Sequence[float] | Sequence[str] | Sequence[bool]]


def attend(attention: Attention, step: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The operator where the mask is causal within the window, matrix products elsewhere."""
    if attention.mask is None:
        return group_query_attention(attention, step)
    key, value = attention.past_key, attention.past_value
    if not attention.cached:
        key, value = append(key, attention.key, step), append(value, attention.value, step)
    output = masked_attention(
        attention.query, key, value, attention.mask, attention.scale, attention.softcap, attention.sinks
    )
    return output, key, value


def group_query_attention(
    attention: Attention, step: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Emit GroupQueryAttention; rotary embedding and packed projections are folded in by later passes."""
    batch, heads, length, _ = attention.query.shape
    kv_heads, value_size = attention.key.shape[1], attention.value.shape[3]
    size = attention.past_key.shape[3]
    query = _flat(attention.query, size)  # [B, S, H * D]
    key = _flat(attention.key, size)  # [B, S, K * D]
    value = _flat(attention.value, size)  # [B, S, K * D]
    inputs: list[torch.Tensor | None] = [query, key, value, attention.past_key, attention.past_value]
    inputs += [step["seqlens_k"], step["total_sequence_length"]]
    attributes: Attributes = {"num_heads": heads, "kv_num_heads": kv_heads, "scale": attention.scale}
    if attention.window is not None:
        attributes["local_window_size"] = attention.window
    if attention.rolling:
        attributes["sliding_window_cache"] = 1
    if attention.softcap is not None:
        attributes["softcap"] = attention.softcap
    if attention.sinks is not None:
        inputs += [None, None, None, None, attention.sinks]
    output, present_key, present_value = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        inputs,
        attrs=attributes,
        dtypes=(query.dtype, attention.past_key.dtype, attention.past_value.dtype),
        shapes=(query.shape, attention.past_key.shape, attention.past_value.shape),
        version=1,
    )
    output = output.reshape(batch, length, heads, size)  # [B, S, H, D]
    return output[..., :value_size] if value_size != size else output, present_key, present_value


def _flat(states: torch.Tensor, size: int) -> torch.Tensor:
    """Heads [B, N, S, D] side by side [B, S, N * size]; zeros fill up heads that are smaller than the
    operator's size for queries, keys and values."""
    batch, heads, length, given = states.shape
    if given != size:
        states = torch.nn.functional.pad(states, (0, size - given))
    return states.transpose(1, 2).reshape(batch, length, heads * size)


def append(cache: torch.Tensor, new: torch.Tensor, step: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Emit TensorScatter along the cache's axis of tokens."""
    first = step["seqlens_k"].to(torch.int64) + 1 - new.shape[2]  # [B]
    written: torch.Tensor = torch.onnx.ops.symbolic(
        "TensorScatter", [cache, new, first], attrs={"axis": 2}, dtype=cache.dtype, shape=cache.shape, version=24
    )
    return written


ORT = Dialect(
    name="ort",
    opset=24,
    step_inputs=(
        StepInput("seqlens_k", torch.int32, ("batch",)),
        StepInput("total_sequence_length", torch.int32, ()),
    ),
    attend=attend,
    append=append,
    head_size_multiple=8,
)
