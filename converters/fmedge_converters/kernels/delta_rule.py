"""The gated delta rule: chunk_gated_delta_rule (Gated DeltaNet, https://arxiv.org/abs/2412.06464), and chunk_kda, whose
decay differs by dimension of the key (Kimi Delta Attention, https://arxiv.org/abs/2510.26692)."""

from __future__ import annotations

from typing import Any

import torch

from fmedge_converters.kernels.linear_attention import linear_attention
from fmedge_converters.kernels.states import States

EPSILON = 1e-6
"""Of the norm of queries and keys, as in flash-linear-attention."""


def delta_rule(
    _states: States,
    query: torch.Tensor,  # [B, S, G, K]
    key: torch.Tensor,  # [B, S, G, K]
    value: torch.Tensor,  # [B, S, H, V]
    g: torch.Tensor,  # [B, S, H] or [B, S, H, K]
    beta: torch.Tensor,  # [B, S, H]
    chunk_size: int = 64,
    initial_state: torch.Tensor | None = None,  # [B, H, K, V]
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **_others: Any,  # noqa: ANN401 - where packed sequences begin; a row is one sequence
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The output [B, S, H, V], and the state after the last token if it is asked for."""
    size = query.shape[-1]
    if use_qk_l2norm_in_kernel:
        query, key = _normalize(query), _normalize(key)
    output, state = linear_attention("gated_delta", query, key, value, g, size**-0.5, initial_state, beta)
    return output.to(value.dtype), state if output_final_state else None


def _normalize(heads: torch.Tensor) -> torch.Tensor:
    heads = heads.float()
    return heads * torch.rsqrt((heads * heads).sum(-1, keepdim=True) + EPSILON)
