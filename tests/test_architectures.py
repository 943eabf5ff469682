"""docs/architectures.md is true: what it calls exact gives PyTorch's tokens, what it calls refused is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from architectures import documented, evaluate

REPRESENTATIVES: dict[str, dict[str, Any]] = {
    "phi": {},  # partial rotation, LayerNorm
    "cohere": {},  # interleaved rotation, parallel blocks, scaled logits
    "qwen2": {},  # biases on q, k and v
    "gemma2": {},  # soft-capped scores and logits, windows
    "granite": {},  # multipliers of embeddings, residuals, attention and logits
    "smollm3": {},  # layers without positions
    "gpt_bigcode": {},  # multi-query
    "gptj": {},  # attention in code of its own, one cache append
    "bloom": {},  # ALiBi
    "falcon": {},  # multi-query, attention in code of its own
    "gpt_neo": {},  # a table of positions for its windows
    "opt": {},  # learned positions with an offset
    "gpt_neox": {},  # needs a cache
    "mixtral": {},  # experts, merged from single tensors
    "gpt_oss": {},  # attention sinks, experts with biases
    "deepseek_v3": {},  # latent attention, routing in groups
    "llama4_text": {"attn_temperature_tuning": False},  # chunked masks, complex rotation
    "gemma3n_text": {},  # shared caches, erfinv
    "gemma4_text": {},  # head sizes by layer
    "lfm2": {},  # short convolutions
    "mamba": {},  # selective scan
    "mamba2": {},  # state-space duality
    "qwen3_next": {},  # gated delta rule
    "falcon_h1": {},  # attention and state space in one layer
    "zamba2": {},  # layers that share weights, with an adapter each
}
SLIDING, WHOLE = "sliding_attention", "full_attention"
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
UNUSUAL: dict[str, tuple[str, dict[str, Any]]] = {
    "one layer, odd sizes": (
        "llama",
        {"num_hidden_layers": 1, "hidden_size": 70, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 20,
         "vocab_size": 32001, "intermediate_size": 100, "attention_bias": True, "mlp_bias": True},
    ),
    "seven layers, heads wider than the model": (
        "qwen3",
        {"num_hidden_layers": 7, "layer_types": None, "head_dim": 40, "num_attention_heads": 3,
         "num_key_value_heads": 1, "attention_bias": True},
    ),
    "a window in some layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2, "num_hidden_layers": 4,
         "layer_types": [WHOLE, WHOLE, SLIDING, SLIDING]},
    ),
    "a window beyond every prompt": ("mistral", {"sliding_window": 200}),
    "a window of three": ("mistral", {"sliding_window": 3}),
    "one expert for each token": ("qwen3_moe", {"num_experts_per_tok": 1, "norm_topk_prob": False}),
    "groups of experts, shared ones": (
        "glm4_moe",
        {"num_hidden_layers": 3, "use_qk_norm": True, "n_routed_experts": 6, "n_group": 3, "topk_group": 1},
    ),
    "yarn where there are no windows": (
        "olmo3",
        {"num_hidden_layers": 5, "layer_types": [SLIDING, SLIDING, WHOLE, SLIDING, WHOLE], "sliding_window": 7,
         "rope_parameters": YARN},
    ),
    "state space in groups": (
        "granitemoehybrid",
        {"num_hidden_layers": 4, "layer_types": ["mamba", "mamba", "attention", "mamba"], "mamba_n_groups": 2,
         "mamba_d_conv": 3, "num_local_experts": 0, "position_embedding_type": "rope"},
    ),
    "seven layers of state space": (
        "mamba2",
        {"num_hidden_layers": 7, "n_groups": 2, "use_bias": True, "conv_kernel": 3, "tie_word_embeddings": True},
    ),
    "longer and shorter convolutions": (
        "lfm2",
        {"num_hidden_layers": 4, "layer_types": ["conv", "conv", "full_attention", "conv"], "conv_L_cache": 4,
         "conv_bias": True, "num_key_value_heads": 1},
    ),
    "scores scaled by layer": (
        "gpt2",
        {"n_layer": 7, "n_inner": 100, "scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False},
    ),
}  # fmt: skip
"""Held out when the exporter was written: sizes and switches that the types' tiny models do not have."""
OTHERS = {"bert": "not a text decoder", "xlnet": "refused", "rwkv": "refused", "trocr": "refused"}


@pytest.mark.medium
@pytest.mark.parametrize("model_type", REPRESENTATIVES)
def test_representatives_give_the_tokens_of_pytorch(model_type: str, tmp_path: Path) -> None:
    outcome = evaluate(model_type, tmp_path, **REPRESENTATIVES[model_type])
    assert outcome.kind == "exact", outcome.detail
    # The page has every type as it comes.
    assert documented()[model_type] == "exact" or REPRESENTATIVES[model_type]


@pytest.mark.medium
def test_a_bias_that_is_computed_in_bfloat16(tmp_path: Path) -> None:
    outcome = evaluate("falcon", tmp_path, alibi=True)
    assert outcome.kind == "exact", outcome.detail


@pytest.mark.medium
@pytest.mark.parametrize("model_type", OTHERS)
def test_what_cannot_be_exported_is_refused(model_type: str, tmp_path: Path) -> None:
    outcome = evaluate(model_type, tmp_path)
    assert outcome.kind == OTHERS[model_type] == documented()[model_type]


@pytest.mark.slow
@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_configurations_give_the_tokens_of_pytorch(name: str, tmp_path: Path) -> None:
    model_type, changes = UNUSUAL[name]
    outcome = evaluate(model_type, tmp_path, **changes)
    assert outcome.kind == "exact", outcome.detail


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(documented()))
def test_the_page_of_architectures_is_true(model_type: str, tmp_path: Path) -> None:
    outcome = evaluate(model_type, tmp_path)
    assert outcome.kind == documented()[model_type], outcome.detail


def test_the_page_names_every_model_type() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert set(documented()) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
