"""The short causal convolution of each channel, causal_conv1d_fn: com.microsoft::CausalConvWithState.

Operator: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md. At one token it is ten times as
fast as joining the columns and a Conv on the CPU; the activation stays outside, where it is vectorized (ONNX Runtime
1.32).
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.activations import ACT2FN

from fmedge_converters.kernels.states import States


def causal_convolution(
    states: States,
    hidden_states: torch.Tensor,  # [B, C, S], or [B, C, K - 1 + S] as the cache joined it
    weight: torch.Tensor,  # [C, K]
    bias: torch.Tensor | None = None,  # [C]
    activation: str | None = None,
    **_others: Any,  # noqa: ANN401 - where packed sequences begin; a row is one sequence
) -> torch.Tensor:
    """The convolved new columns [B, C, S]. transformers drops those of the kept columns, which are not computed."""
    channels, width = weight.shape
    parts = states.split(hidden_states, width - 1)
    kept, new = parts if parts is not None else (None, hidden_states)
    output, present = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::CausalConvWithState",
        (new.to(weight.dtype), weight.unsqueeze(1), bias, None if kept is None else kept.to(weight.dtype)),
        dtypes=(weight.dtype, weight.dtype),
        shapes=(new.shape, (new.shape[0], channels, width - 1)),
        version=1,
    )
    if kept is not None:
        states.keep(hidden_states, present.to(kept.dtype))
    if activation is not None:
        output = ACT2FN[activation](output)
    return output.to(hidden_states.dtype)
