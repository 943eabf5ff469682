"""A tiny configuration for any causal language model of transformers.

Sizes are set by the names that configurations use; nothing here knows a model type, but for a few whose sizes depend on
each other in ways that no name tells (CONSTRAINED).
"""

from __future__ import annotations

from typing import Any

from fmedge_converters.decoder import quiet_libraries, text_config
from transformers import AutoConfig, PretrainedConfig

LAYERS = 2
MOST_LAYERS = 8
SIZES: dict[str, int] = {
    "hidden_size": 64,
    "n_embd": 64,
    "d_model": 64,
    "dim": 64,
    "embed_dim": 64,
    "word_embed_proj_dim": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "n_inner": 96,
    "ffn_dim": 96,
    "ffn_hidden_size": 96,
    "feed_forward_proj_dim": 96,
    "d_ff": 96,
    "dff": 96,
    "decoder_ffn_dim": 96,
    "shared_expert_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 48,
    "shared_intermediate_size": 48,
    "intermediate_size_mlp": 96,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 16,
    "attention_head_dim": 16,
    "rotary_dim": 8,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "qk_head_dim": 32,
    "v_head_dim": 16,
    "vocab_size": 320,
    "vocab_size_per_layer_input": 320,
    "hidden_size_per_layer_input": 8,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "max_seq_len": 256,
    "max_seq_length": 256,
    "max_target_positions": 256,
    "n_ctx": 256,
    "sliding_window": 16,
    "attention_window_size": 16,
    "attention_chunk_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "mamba_d_state": 16,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_d_ssm": 128,
    "mamba_dt_rank": 8,
    "mamba_n_groups": 1,
    "n_groups": 1,
    "ssm_state_size": 16,
    "state_size": 16,
    "time_step_rank": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "lru_width": 64,
    "attention_hidden_size": 64,
}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1}
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")

CONSTRAINED: dict[str, dict[str, Any]] = {}
"""Sizes that must fit each other."""


def tiny_config(model_type: str, **changes: Any) -> PretrainedConfig:
    """The configuration of a model type with every size small; a wrapper's text part shrinks too."""
    with quiet_libraries():
        default = AutoConfig.for_model(model_type)
        depth = _depth(text_config(default))
        values = _small(default, depth)
        if (part := _text_part(default)) is not None:
            values[part] = {**getattr(default, part).to_dict(), **_small(getattr(default, part), depth)}
        return type(default)(**{**values, **CONSTRAINED.get(model_type, {}), **changes})


def _text_part(config: PretrainedConfig) -> str | None:
    text = text_config(config)
    return next((name for name in config.sub_configs if getattr(config, name, None) is text), None)


def _small(config: PretrainedConfig, depth: int) -> dict[str, Any]:
    values: dict[str, Any] = {name: size for name, size in SIZES.items() if _is_number(config, name)}
    layers = next((getattr(config, name) for name in DEPTHS if _is_number(config, name)), 0)
    values |= {name: depth for name in DEPTHS if _is_number(config, name)}
    values |= {name: token for name, token in TOKENS.items() if getattr(config, name, None) is not None}
    if _is_number(config, "kv_lora_rank"):  # latent attention has as many key heads as heads
        values["num_key_value_heads"] = SIZES["num_attention_heads"]
    for name, value in config.to_dict().items():
        if isinstance(value, list | tuple) and layers and len(value) == layers:
            values[name] = list(value[:depth])
    return values


def _depth(config: PretrainedConfig) -> int:
    """As many layers as it takes to see every kind of them."""
    layers = next((getattr(config, name) for name in DEPTHS if _is_number(config, name)), LAYERS)
    kinds = [
        value
        for value in config.to_dict().values()
        if isinstance(value, list | tuple) and len(value) == layers and all(isinstance(i, str | int) for i in value)
    ]
    rows = list(zip(*kinds, strict=True))
    needed = max((rows.index(row) + 1 for row in set(rows)), default=LAYERS)
    return max(LAYERS, min(needed, MOST_LAYERS))


def _is_number(config: PretrainedConfig, name: str) -> bool:
    descriptor = getattr(type(config), name, None)
    if isinstance(descriptor, property) and descriptor.fset is None:
        return False
    value = getattr(config, name, None)
    return isinstance(value, int) and not isinstance(value, bool)
