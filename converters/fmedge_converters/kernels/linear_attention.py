"""The recurrence of linear attention in one node: com.microsoft::LinearAttention.

For each head, with a state S [K, V], a decay g, a rate b and one token after another:

    S = exp(g) * S + outer(k, b * (v - exp(g) * S^T k))      the rule "gated_delta"
    S = exp(g) * S + outer(k, v)                             the rule "gated"
    o = scale * S^T q

Operator: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md. On the CPU it is some twenty
times as fast as GatedDeltaNet, which computes the same (ONNX Runtime 1.32).
"""

from __future__ import annotations

from typing import Literal

import torch


def linear_attention(
    rule: Literal["gated", "gated_delta"],
    query: torch.Tensor,  # [B, S, G, K]
    key: torch.Tensor,  # [B, S, G, K]
    value: torch.Tensor,  # [B, S, H, V]
    decay: torch.Tensor,  # [B, S, H], or [B, S, H, K] with one for each dimension of the key; logarithms
    scale: float,
    state: torch.Tensor | None,  # [B, H, K, V]; None is zeros
    beta: torch.Tensor | None = None,  # [B, S, H]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Emit the node in fp32: the output [B, S, H, V] and the state [B, H, K, V] after the last token.

    G groups of queries and keys serve H / G consecutive heads each.
    """
    batch, length, groups, key_size = query.shape
    heads, value_size = value.shape[2:]
    if state is None:
        state = value.new_zeros(batch, heads, key_size, value_size, dtype=torch.float32)
    query, key, value, decay = (item.reshape(batch, length, -1).float() for item in (query, key, value, decay))
    output, present = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::LinearAttention",
        (query, key, value, state.float(), decay, None if beta is None else beta.float()),
        attrs={"update_rule": rule, "scale": scale, "q_num_heads": groups, "kv_num_heads": heads},
        dtypes=(torch.float32, torch.float32),
        shapes=(value.shape, state.shape),
        version=1,
    )
    return output.reshape(batch, length, heads, value_size), present
