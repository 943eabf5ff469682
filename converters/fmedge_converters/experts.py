"""The experts function that stands in for transformers' own while a model is traced.

A mixture of experts sends each token to k of its E experts and adds up what they return, weighted by its router
(https://arxiv.org/abs/1701.06538). The router, the activation and everything around them stay the model's own code.
Ours sorts the rows by expert and records two kinds of nodes, which exist between passes only:

    ExpertLinear(rows [R, K], sizes [E], weight [E, N, K], bias [E, N]?) -> [R, N]
        y = x @ weight[e].T + bias[e]; the first sizes[0] rows belong to expert 0, the next sizes[1] to expert 1, ...
    CombineExperts(rows [R, H], order [R], index [T, k], weights [T, k], x [T, H]) -> [T, H]
        row i is what the expert index[t, j] made of token t, with t, j = divmod(order[i], k); they are weighted and
        added up. `x` is what the tokens looked like before.

R is T * k.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

IMPLEMENTATION = "fmedge"
DOMAIN = "fmedge"
EXPERT_LINEAR = "ExpertLinear"
COMBINE_EXPERTS = "CombineExperts"


def run_experts(
    module: Any,  # noqa: ANN401 - what `use_experts_implementation` made of an experts class
    hidden_states: torch.Tensor,  # [T, H]
    top_k_index: torch.Tensor,  # [T, k]
    top_k_weights: torch.Tensor,  # [T, k]
) -> torch.Tensor:
    """The experts function that transformers calls; its signature is theirs. Returns [T, H]."""
    gated = "gate_up" if module.has_gate else "up"
    first, second = (getattr(module, f"{name}_proj") for name in (gated, "down"))
    first_bias, second_bias = (
        getattr(module, f"{name}_proj_bias") if module.has_bias else None for name in (gated, "down")
    )
    chosen = top_k_index.shape[1]
    flat = top_k_index.reshape(-1)  # [R]
    order = _ascending(flat)  # [R]
    sizes = (flat.unsqueeze(1) == torch.arange(first.shape[0])).sum(0)  # [E]
    rows = hidden_states.index_select(0, order // chosen)  # [R, H]
    rows = _expert_linear(rows, sizes, first, first_bias, transposed=module.is_transposed)
    rows = module._apply_gate(rows) if module.has_gate else module.act_fn(rows)  # [R, I]
    rows = _expert_linear(rows, sizes, second, second_bias, transposed=module.is_transposed)  # [R, H]
    if module.has_post_expert_norm:
        rows = module.post_expert_norm(rows)
    combined: torch.Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{COMBINE_EXPERTS}",
        (rows, order, top_k_index, top_k_weights.to(rows.dtype), hidden_states),
        dtype=hidden_states.dtype,
        shape=(hidden_states.shape[0], rows.shape[1]),
        version=1,
    )
    return combined


def _ascending(values: torch.Tensor) -> torch.Tensor:
    """The places [R] of values [R] from the smallest to the largest, in the operators that ONNX has for it."""
    length = torch.onnx.ops.symbolic("Shape", (values,), dtype=torch.int64, shape=(1,))
    _, order = torch.onnx.ops.symbolic_multi_out(
        "TopK",
        (values, length),
        {"axis": 0, "largest": 0, "sorted": 1},
        dtypes=(values.dtype, torch.int64),
        shapes=(values.shape, values.shape),
    )
    return order


def _expert_linear(
    rows: torch.Tensor,  # [R, K]
    sizes: torch.Tensor,  # [E]
    weight: torch.Tensor,  # [E, N, K], or [E, K, N]
    bias: torch.Tensor | None,  # [E, N]
    *,
    transposed: bool,
) -> torch.Tensor:
    matrix = weight.transpose(1, 2) if transposed else weight  # [E, N, K]
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{EXPERT_LINEAR}",
        (rows, sizes, matrix) if bias is None else (rows, sizes, matrix, bias),
        dtype=rows.dtype,
        shape=(rows.shape[0], matrix.shape[1]),
        version=1,
    )


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, run_experts)
