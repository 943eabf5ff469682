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
    "emb_dim": 64,
    "d_model": 64,
    "dim": 64,
    "embed_dim": 64,
    "word_embed_proj_dim": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "n_inner": 96,
    "expert_ffn_hidden_size": 48,
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
    "window_size": 16,
    "attention_window_size": 16,
    "attention_chunk_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "num_expert_group": 1,
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
    "linear_num_heads": 4,
    "linear_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "lru_width": 64,
    "attention_hidden_size": 64,
}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1}
OPTIONAL = ("head_dim", "num_key_value_heads", "moe_intermediate_size", "n_routed_experts", "n_shared_experts")
"""Which configurations may leave out and mean otherwise."""
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
CONSTRAINED: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "dots3_note_text": {"head_dim": 32},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_hidden_layers": 3,
    },
    "zamba": {
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "num_hidden_layers": 4,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "num_hidden_layers": 4,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "n_mamba_heads": 8,
        "mamba_headdim": 16,
        "num_mem_blocks": 1,
    },
    "bamba": {"attn_layer_indices": [1], "num_hidden_layers": 3},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"], "num_hidden_layers": 3},
    "mamba2": {"num_heads": 8},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "gemma3n_text": {
        "num_hidden_layers": 6,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention"] * 2 + ["full_attention"] + ["sliding_attention"] * 2 + ["full_attention"],
        "activation_sparsity_pattern": [0.5] * 6,
        "laurel_rank": 8,
        "intermediate_size": [96] * 6,
    },
    "dots1": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "zaya": {"num_experts_per_tok": 1},
}
"""Sizes that must fit each other."""


def tiny_config(model_type: str, **changes: Any) -> PretrainedConfig:
    """The configuration of a model type with every size small; a wrapper's text part shrinks too."""
    with quiet_libraries():
        default = AutoConfig.for_model(model_type)
        depth = _depth(text_config(default))
        values = _small(default, depth)
        for part in default.sub_configs:
            if isinstance(inner := getattr(default, part, None), PretrainedConfig):
                values[part] = {**inner.to_dict(), **_small(inner, depth)}
        return type(default)(**{**values, **CONSTRAINED.get(model_type, {}), **changes})


def _small(config: PretrainedConfig, depth: int) -> dict[str, Any]:
    given = config.to_dict()
    layers = _layers(given)
    values: dict[str, Any] = {
        name: size
        for name, size in SIZES.items()
        if _is_number(given.get(name)) or (name in OPTIONAL and name in given and given[name] is None)
    }
    values |= {name: token for name, token in TOKENS.items() if given.get(name) is not None}
    values |= {name: depth for name in DEPTHS if _is_number(given.get(name))}
    if _is_number(given.get("kv_lora_rank")):  # latent attention has as many key heads as heads
        values["num_key_value_heads"] = SIZES["num_attention_heads"]
    for name, value in given.items():
        if isinstance(value, list | tuple) and len(value) == layers:
            values[name] = list(value[:depth])
    if isinstance(overrides := given.get("per_layer_config"), dict):
        values["per_layer_config"] = {layer: changes for layer, changes in overrides.items() if int(layer) < depth}
    return values


def _depth(config: PretrainedConfig) -> int:
    """As many layers as it takes to see every kind of them."""
    given = config.to_dict()
    layers = _layers(given)
    kinds = [
        value
        for value in given.values()
        if isinstance(value, list | tuple) and len(value) == layers and all(isinstance(i, str | int) for i in value)
    ]
    rows = list(zip(*kinds, strict=True))
    needed = max((rows.index(row) + 1 for row in set(rows)), default=LAYERS)
    return max(LAYERS, min(needed, MOST_LAYERS))


def _layers(given: dict[str, Any]) -> int:
    return next((given[name] for name in DEPTHS if _is_number(given.get(name))), -1)


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
