"""Exported graphs against PyTorch: greedy tokens in ragged batches, rows finishing at different times."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from fmedge_converters.export import export
from fmedge_converters.export_options import ExportOptions
from fmedge_runtimes.load import load
from fmedge_runtimes.sampling import Sampling
from models import greedy, make_model

LENGTHS = (1, 40, 7, 3, 23)
"""Of the prompts; more than the batch has rows, so that some wait."""

REPRESENTATIVES = {
    "llama": {},
    "qwen3": {},  # norms on the heads
    "gemma3_text": {"sliding_window": 16},  # two kinds of layers, two rotary embeddings, scaled and tied embeddings
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},  # learned positions, Conv1D
}


def check(folder: Path, tmp_path: Path, eos_from: int = 4) -> None:
    """Export in fp32 and compare each row with transformers.generate on that row alone."""
    bundle = export(ExportOptions(str(folder), tmp_path / "bundle", verify="none")).folder
    with load(bundle, max_batch=3) as model:
        vocabulary = model.bundle.manifest.text.vocabulary
        random = np.random.default_rng(0)
        prompts = [random.integers(1, vocabulary, length).tolist() for length in LENGTHS]
        wanted = [greedy(folder, prompt, 20) for prompt in prompts]
        found = model.generate(prompts, Sampling(max_new_tokens=20, ignore_eos=True))
        assert [list(completion.tokens) for completion in found] == wanted
        budgets = [3, 20, 1, 11, 6]
        found = model.generate(prompts, [Sampling(max_new_tokens=budget, ignore_eos=True) for budget in budgets])
        assert [list(item.tokens) for item in found] == [
            row[:budget] for row, budget in zip(wanted, budgets, strict=True)
        ]


@pytest.mark.parametrize("model_type", REPRESENTATIVES)
def test_greedy_tokens_equal_pytorch(model_type: str, tmp_path: Path) -> None:
    check(make_model(tmp_path / "model", model_type, **REPRESENTATIVES[model_type]), tmp_path)


@pytest.mark.medium
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 64},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_rotary_variants(rope: dict[str, object], tmp_path: Path) -> None:
    parameters = {"rope_theta": 10000.0, **rope}
    check(make_model(tmp_path / "model", rope_parameters=parameters), tmp_path)


@pytest.mark.medium
@pytest.mark.parametrize(
    ("dtype", "changes"),
    [
        pytest.param(torch.bfloat16, {"max_shard_size": "100KB", "tie_word_embeddings": True}, id="bf16-sharded-tied"),
        pytest.param(torch.float16, {"attention_bias": True, "mlp_bias": True}, id="fp16-biases"),
    ],
)
def test_checkpoints_as_people_have_them(dtype: torch.dtype, changes: dict[str, object], tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", dtype=dtype, **changes)
    if "max_shard_size" in changes:
        assert len(list(folder.glob("model-*.safetensors"))) > 1
    check(folder, tmp_path)


@pytest.mark.medium
def test_heads_of_a_size_that_the_operator_lacks(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "mistral", head_dim=12, num_key_value_heads=1, sliding_window=16)
    check(folder, tmp_path)


@pytest.mark.medium
def test_prompts_longer_than_a_prefill_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fmedge_runtimes.decoder.PREFILL_CHUNK", 16)
    check(make_model(tmp_path / "model", "mistral", sliding_window=8), tmp_path)


@pytest.mark.medium
def test_rotary_embeddings_that_change_with_the_length_take_the_form_of_the_context(tmp_path: Path) -> None:
    dim = 8
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * dim,
        "long_factor": [2.0] * dim,
        "original_max_position_embeddings": 64,
        "factor": 4.0,
    }
    folder = make_model(
        tmp_path / "model", "phi3", rope_parameters=rope, original_max_position_embeddings=64, pad_token_id=0
    )
    # Within the first length the short form, beyond it the long one: transformers picks by the length of the text.
    for context, length in ((64, 30), (None, 90)):
        output = tmp_path / f"bundle{length}"
        bundle = export(ExportOptions(str(folder), output, context=context, verify="graph")).folder
        prompt = [1 + token % 300 for token in range(length)]
        with load(bundle) as model:
            (found,) = model.generate(prompt, Sampling(max_new_tokens=20, ignore_eos=True))
        assert list(found.tokens) == greedy(folder, prompt, 20)


def test_a_rotary_embedding_that_changes_with_every_token_is_refused_beyond_its_first_length(tmp_path: Path) -> None:
    from fmedge_runtimes.errors import SourceError

    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    folder = make_model(tmp_path / "model", rope_parameters=rope)
    with pytest.raises(SourceError, match="--context 64"):
        export(ExportOptions(str(folder), tmp_path / "bundle", verify="none"))
    assert not (tmp_path / "bundle").exists()
