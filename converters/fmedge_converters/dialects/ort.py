"""The dialect of ONNX Runtime: com.microsoft::GroupQueryAttention over an in-place cache [B, K, C, D].

`seqlens_k[b]` is the number of cached tokens of row b after this step, minus one; new keys and values are written
behind the cached ones. `total_sequence_length` is the largest such number plus one.
Operator: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fmedge_converters.dialects.dialect import Attention, Dialect, StepInput


def group_query_attention(
    attention: Attention, step: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Emit GroupQueryAttention; rotary embedding and packed projections are folded in by later passes."""
    batch, heads, length, size = attention.query.shape
    kv_heads = attention.key.shape[1]
    query = attention.query.transpose(1, 2).reshape(batch, length, heads * size)  # [B, S, H * D]
    key = attention.key.transpose(1, 2).reshape(batch, length, kv_heads * size)  # [B, S, K * D]
    value = attention.value.transpose(1, 2).reshape(batch, length, kv_heads * size)  # [B, S, K * D]
    inputs: list[torch.Tensor | None] = [query, key, value, attention.past_key, attention.past_value]
    inputs += [step["seqlens_k"], step["total_sequence_length"]]
    attributes: dict[
        str, int | float | str | bool | Sequence[int] | Sequence[float] | Sequence[str] | Sequence[bool]
    ] = {
        "num_heads": heads,
        "kv_num_heads": kv_heads,
        "scale": attention.scale,
    }
    if attention.window is not None:
        attributes["local_window_size"] = attention.window
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
    return output, present_key, present_value


ORT = Dialect(
    name="ort",
    opset=23,
    step_inputs=(
        StepInput("seqlens_k", torch.int32, ("batch",)),
        StepInput("total_sequence_length", torch.int32, ()),
    ),
    attend=group_query_attention,
)
