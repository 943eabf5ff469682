"""Attention of the parts of image pipelines in ONNX's own operators, for TensorRT."""

from __future__ import annotations

import torch

from fmedge_converters.dialects.tensorrt import has_kernel
from fmedge_converters.fused_operators import PartOperators, added_bias, group_norm
from fmedge_converters.masked_attention import masked_attention


def attention_node(
    query: torch.Tensor,  # [B, N, S, D]
    key: torch.Tensor,  # [B, K, T, D]
    value: torch.Tensor,  # [B, K, T, E]
    attn_mask: torch.Tensor | None = None,  # [B or 1, N or 1, S or 1, T]
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:  # [B, N, S, E]
    """ONNX's Attention with the arguments of torch's scaled_dot_product_attention, where TensorRT has a kernel for it:
    16-bit floats, and heads of one size that is not too large. Matrix products elsewhere."""
    del dropout_p, enable_gqa  # there is no dropout in evaluation; groups of heads follow from the shapes
    if query.dtype == torch.float32 or not has_kernel(query, value):
        return attention_products(query, key, value, attn_mask, 0.0, is_causal, scale=scale)
    inputs = [query, key, value]
    mask = _mask(query, key, attn_mask, is_causal=is_causal)
    if mask is not None:
        inputs.append(mask)
    output: torch.Tensor = torch.onnx.ops.symbolic(
        "Attention",
        inputs,
        attrs={"scale": query.shape[3] ** -0.5 if scale is None else scale},
        dtype=query.dtype,
        shape=query.shape,
        version=23,
    )
    return output


def attention_products(
    query: torch.Tensor,  # [B, N, S, D]
    key: torch.Tensor,  # [B, K, T, D]
    value: torch.Tensor,  # [B, K, T, E]
    attn_mask: torch.Tensor | None = None,  # [B or 1, N or 1, S or 1, T]
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:  # [B, N, S, E]
    """The same in matrix products and a softmax in fp32."""
    del dropout_p, enable_gqa
    mask = _mask(query, key, attn_mask, is_causal=is_causal)
    scaled = query * (query.shape[3] ** -0.5 if scale is None else scale)
    return masked_attention(scaled, key, value, mask, 1.0, None, None).transpose(1, 2)


def _mask(
    query: torch.Tensor, key: torch.Tensor, given: torch.Tensor | None, *, is_causal: bool
) -> torch.Tensor | None:
    """What is added to the scores [B or 1, N or 1, S, T]."""
    if is_causal:
        rows, columns = torch.arange(query.shape[2])[:, None], torch.arange(key.shape[2])[None]
        given = (columns <= rows)[None, None]  # [1, 1, S, T]
    return None if given is None else added_bias(given, query)


TENSORRT_OPERATORS = PartOperators(opset=23, attention=attention_node, group_norm=group_norm)
TENSORRT_COMPAT_OPERATORS = PartOperators(opset=21, attention=attention_products, group_norm=group_norm)
