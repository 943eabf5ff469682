"""The state-space duality of Mamba-2, mamba_chunk_scan_combined: linear attention whose queries are C, keys are B,
values are dt * x, and decay is exp(dt * A) (https://arxiv.org/abs/2405.21060)."""

from __future__ import annotations

from typing import Any

import torch

from fmedge_converters.kernels.linear_attention import linear_attention
from fmedge_converters.kernels.states import States


def state_space(
    _states: States,
    hidden_states: torch.Tensor,  # [B, S, H, P]
    dt: torch.Tensor,  # [B, S, H]
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,  # [H]
    initial_states: torch.Tensor | None = None,  # [B, H, N, P]
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **_others: Any,  # noqa: ANN401 - where packed sequences begin; a row is one sequence
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The output [B, S, H, P], and the states after the last token if they are asked for.

    States have their axes as the operator wants them, [B, H, N, P], where transformers has [B, H, P, N]. Its layers
    only carry them from here to here.
    """
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = torch.nn.functional.softplus(dt)
    if tuple(dt_limit) != (0.0, float("inf")) or not dt_softplus:
        dt = torch.clamp(dt, *dt_limit)
    hidden_states, dt = hidden_states.float(), dt.float()
    value = hidden_states * dt[..., None]  # [B, S, H, P]
    output, states = linear_attention("gated", C, B, value, dt * A.float(), 1.0, initial_states)
    if D is not None:
        output = output + hidden_states * D[:, None]
    return (output, states) if return_final_states else output
