"""Attention over a cache in plain matrix products, behind any mask. Exact for all heads; its cost grows with the
cache's capacity, so it is for what no operator expresses.

softmax(scale * q @ k.T, capped, + mask, with sinks) @ v: https://arxiv.org/abs/1706.03762.
"""

from __future__ import annotations

import torch


def masked_attention(
    query: torch.Tensor,  # [B, H, S, D]
    key: torch.Tensor,  # [B, K, C, D]
    value: torch.Tensor,  # [B, K, C, E]
    mask: torch.Tensor | None,  # [B or 1, H or 1, S, C]
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,  # [H]
) -> torch.Tensor:
    """Returns [B, S, H, E]."""
    batch, heads, length, size = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    # The queries of one key head as the rows of one product: the keys are not repeated.
    grouped = query.reshape(batch, kv_heads, group * length, size)  # [B, K, G * S, D]
    scores = torch.matmul(grouped, key.transpose(2, 3)).reshape(batch, heads, length, -1)  # [B, H, S, C]
    if scale != 1.0:
        scores = scores * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask
    if sinks is not None:
        column = sinks.reshape(1, -1, 1, 1).expand(batch, heads, length, 1).to(scores.dtype)
        scores = torch.cat([scores, column], dim=-1)  # [B, H, S, C + 1]
    weights = torch.nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    weights = weights.reshape(batch, kv_heads, group * length, -1)  # [B, K, G * S, C]
    output = torch.matmul(weights, value).reshape(batch, heads, length, -1)  # [B, H, S, E]
    return output.transpose(1, 2)
