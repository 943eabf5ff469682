"""The selective scan of Mamba, selective_scan_fn, as an ONNX Scan (https://arxiv.org/abs/2312.00752).

Each channel decays by its own exp(dt * A), so no operator of linear attention fits without holding [B, S, D, N] in
memory; the scan holds one token of it, and is twice as fast on the CPU as LinearAttention with D heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._higher_order_ops.scan import scan

from fmedge_converters.kernels.states import States


def selective_scan(
    states: States,
    hidden_states: torch.Tensor,  # [B, D, S]
    dt: torch.Tensor,  # [B, D, S]
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,  # [B, D, S]
    delta_bias: torch.Tensor | None = None,  # [D]
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **_others: Any,  # noqa: ANN401 - choices among implementations
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The output [B, D, S], and the state [B, D, N] after the last token if it is asked for.

    transformers' form starts from zeros; this one starts from the state that the layer took from the cache.
    """
    if delta_bias is not None:
        dt = dt + delta_bias.to(dt.dtype)[:, None]
    if delta_softplus:
        dt = torch.nn.functional.softplus(dt)
    rates = A.float()  # [D, N]

    def step(state: torch.Tensor, token: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        delta, increment, key, query = token  # [B, D], [B, D], [B, N], [B, N]
        state = state * torch.exp(delta[..., None] * rates) + increment[..., None] * key[:, None]  # [B, D, N]
        return state, torch.matmul(state, query[..., None])[..., 0]  # [B, D, N], [B, D]

    state = states.recurrent(3)
    if state is None:
        state = hidden_states.new_zeros(hidden_states.shape[0], *A.shape, dtype=torch.float32)
    tokens = (dt, dt * hidden_states, B, C)
    # The scan wants a carried tensor to keep its strides.
    last, output = scan(
        step, state.contiguous(), tuple(item.float().permute(2, 0, 1) for item in tokens)
    )  # [B, D, N], [S, B, D]
    output = output.permute(1, 2, 0)
    if D is not None:
        output = output + hidden_states * D[:, None]
    if z is not None:
        output = output * torch.nn.functional.silu(z)
    return (output, last) if return_last_state else output
