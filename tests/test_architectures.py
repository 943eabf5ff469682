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
    "llama4_text": {},  # chunked masks, complex rotation
    "gemma3n_text": {},  # shared caches, erfinv
    "gemma4_text": {},  # head sizes by layer
    "lfm2": {},  # short convolutions
    "mamba": {},  # selective scan
    "mamba2": {},  # state-space duality
    "qwen3_next": {},  # gated delta rule
    "falcon_h1": {},  # attention and state space in one layer
    "zamba2": {},  # layers that share weights, with an adapter each
}
OTHERS = {"bert": "not a text decoder", "xlnet": "refused", "rwkv": "refused", "trocr": "refused"}


@pytest.mark.medium
@pytest.mark.parametrize("model_type", REPRESENTATIVES)
def test_representatives_give_the_tokens_of_pytorch(model_type: str, tmp_path: Path) -> None:
    outcome = evaluate(model_type, tmp_path, **REPRESENTATIVES[model_type])
    assert outcome.kind == "exact", outcome.detail
    assert documented()[model_type] == "exact"


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
@pytest.mark.parametrize("model_type", sorted(documented()))
def test_the_page_of_architectures_is_true(model_type: str, tmp_path: Path) -> None:
    outcome = evaluate(model_type, tmp_path)
    assert outcome.kind == documented()[model_type], outcome.detail


def test_the_page_names_every_model_type() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert set(documented()) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
