"""Operators that stand for several of torch's while a part of a pipeline is traced: here those of ONNX Runtime.

MultiHeadAttention never holds the scores of all positions: at 4096 positions, 8 heads of 40 and a batch of 2 it takes
0.55 CPU-seconds where MatMul and Softmax take 1.3 to 3.3 and gigabytes of memory, and ONNX's own Attention 2.3.
Operator: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True, slots=True)
class PartOperators:
    """How the graphs of parts are written for a target."""

    opset: int
    attention: Callable[..., torch.Tensor]
    """Takes the arguments of torch's scaled_dot_product_attention."""
    group_norm: Callable[..., torch.Tensor]
    """Takes the arguments of torch's group_norm."""


class FusedOperators(TorchFunctionMode):
    """Records attention and group norms as operators, and leaves out squeezes that do nothing."""

    def __init__(self, operators: PartOperators) -> None:
        super().__init__()
        self._operators = operators

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - the result of any torch function
        """Call a function of torch, or record what stands for it."""
        if func is torch.nn.functional.scaled_dot_product_attention:
            return self._operators.attention(*args, **(kwargs or {}))
        if func in (torch.nn.functional.group_norm, torch.group_norm):
            return self._operators.group_norm(*args, **(kwargs or {}))
        if func in CONCATENATIONS:
            return func(_of_one_type(args[0]), *args[1:], **(kwargs or {}))
        if func in SQUEEZES and len(args) == 2 and _is_dynamic(*args):
            return args[0]
        return func(*args, **(kwargs or {}))


CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)
SQUEEZES = (torch.squeeze, torch.Tensor.squeeze)


def _of_one_type(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors in the type that torch would join them in, where ONNX has none: SDXL joins embeddings of sizes in fp32 to
    those of a text in fp16."""
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    return [tensor if tensor.dtype == dtype else tensor.to(dtype) for tensor in tensors]


def _is_dynamic(tensor: torch.Tensor, dim: int) -> bool:
    """Whether an axis has a size that is not known. Torch keeps such an axis if it is not 1, where ONNX would fail."""
    return isinstance(dim, int) and isinstance(tensor.shape[dim], torch.SymInt)


def attention(
    query: torch.Tensor,  # [B, N, S, D]
    key: torch.Tensor,  # [B, N, T, D]
    value: torch.Tensor,  # [B, N, T, E]
    attn_mask: torch.Tensor | None = None,  # [B or 1, N or 1, S or 1, T]
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:  # [B, N, S, E]
    """MultiHeadAttention with the arguments of torch's scaled_dot_product_attention."""
    del dropout_p  # there is none in evaluation
    batch, heads, length, size = query.shape
    if enable_gqa:
        repeats = heads // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    inputs: list[torch.Tensor | None] = [_flat(query), _flat(key), _flat(value)]
    if attn_mask is not None:
        inputs += [None, None, added_bias(attn_mask, query)]
    output = torch.onnx.ops.symbolic(
        "com.microsoft::MultiHeadAttention",
        inputs,
        attrs={"num_heads": heads, "scale": scale or size**-0.5, "unidirectional": int(is_causal)},
        dtype=query.dtype,
        shape=(batch, length, heads * value.shape[3]),
        version=1,
    )
    return output.reshape(batch, length, heads, value.shape[3]).transpose(1, 2)


def group_norm(
    states: torch.Tensor,  # [B, C, ...]
    num_groups: int,
    weight: torch.Tensor | None = None,  # [C]
    bias: torch.Tensor | None = None,  # [C]
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> torch.Tensor:  # [B, C, ...]
    """Each group as one instance of InstanceNormalization. Torch's own form takes long to trace, and that of opset 21
    long to run: ONNX Runtime has no kernel for it."""
    del cudnn_enabled
    groups = states.reshape(states.shape[0], num_groups, -1)  # [B, G, N]
    ones = torch.ones(num_groups, dtype=states.dtype)  # [G]
    normed = torch.onnx.ops.symbolic(
        "InstanceNormalization",
        (groups, ones, torch.zeros_like(ones)),
        attrs={"epsilon": eps},
        dtype=states.dtype,
        shape=groups.shape,
    ).reshape(states.shape)
    channels = (1, -1, *([1] * (states.dim() - 2)))
    if weight is not None:
        normed = normed * weight.reshape(channels)
    return normed if bias is None else normed + bias.reshape(channels)


def _flat(states: torch.Tensor) -> torch.Tensor:
    """Heads [B, N, S, D] side by side [B, S, N * D]."""
    return states.transpose(1, 2).flatten(2)


def added_bias(mask: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """What is added to the scores [B or 1, N or 1, S, T], which broadcasts along the first two axes only; the mask may
    be of booleans."""
    if mask.dtype == torch.bool:
        lowest = torch.finfo(query.dtype).min
        mask = torch.where(mask, 0.0, lowest)
    mask = mask.to(query.dtype)
    while mask.dim() < 4:
        mask = mask.unsqueeze(0)
    return mask.expand(-1, -1, query.shape[2], -1)


ORT_OPERATORS = PartOperators(opset=20, attention=attention, group_norm=group_norm)
"""Above opset 20 a group norm is one operator, for which ONNX Runtime has no kernel."""
