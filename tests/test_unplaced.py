"""Tensors that the model of config.json has no place for: harmless ones are left out, parts of the model are not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from fmedge_converters.checkpoint import Checkpoint, Files
from fmedge_converters.decoder import empty_model
from fmedge_runtimes.errors import SourceError
from models import make_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PreTrainedModel

LAYER = "model.layers.0"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def tensors(tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    return load_file(make_model(tmp_path_factory.mktemp("unplaced") / "model") / "model.safetensors")


@pytest.fixture
def opened(tensors: Tensors, tmp_path: Path) -> Callable[[Tensors], set[str]]:
    """Reads a checkpoint with more tensors, and gives the names of its weights."""
    config = make_model(tmp_path / "model")
    model: PreTrainedModel = empty_model(AutoConfig.from_pretrained(config), torch.float32)

    def read(more: Tensors) -> set[str]:
        save_file({**tensors, **more}, tmp_path / "model" / "model.safetensors")
        with Checkpoint(Files(tmp_path / "model"), np.dtype(np.float32)) as checkpoint:
            return set(checkpoint.weights(model))

    return read


def another_layer(tensors: Tensors, number: int) -> Tensors:
    return {
        name.replace(LAYER, f"model.layers.{number}"): value.clone()
        for name, value in tensors.items()
        if name.startswith(f"{LAYER}.")
    }


@pytest.mark.parametrize(
    ("name", "owner"),
    [
        (f"{LAYER}.self_attn.q_proj.bias", f"{LAYER}.self_attn.q_proj"),
        ("layers.1.mlp.up_proj.bias", "model.layers.1.mlp.up_proj"),  # saved without the head
        (f"{LAYER}.mlp.up_proj.weight_scale_inv", f"{LAYER}.mlp.up_proj"),
        (f"{LAYER}.self_attn.q_proj.lora_A.default.weight", f"{LAYER}.self_attn.q_proj"),
        (f"{LAYER}.input_layernorm.bias", f"{LAYER}.input_layernorm"),
        ("lm_head.bias", "lm_head"),
    ],
)
def test_a_part_of_what_the_model_has_is_an_error(name: str, owner: str, opened: Callable[[Tensors], set[str]]) -> None:
    with pytest.raises(SourceError, match=f"belongs to {owner}, but the model of config.json"):
        opened({name: torch.ones(64)})


def test_more_layers_than_the_configuration_has_are_an_error(
    tensors: Tensors, opened: Callable[[Tensors], set[str]]
) -> None:
    with pytest.raises(SourceError, match=r"holds model\.layers\.2, but config\.json asks for 2 of these layers"):
        opened(another_layer(tensors, 2))


def test_what_the_model_does_without_is_left_out(tensors: Tensors, opened: Callable[[Tensors], set[str]]) -> None:
    predictor = {**another_layer(tensors, 2), "model.layers.2.eh_proj.weight": torch.ones(64, 128)}
    harmless = {
        f"{LAYER}.self_attn.q_proj.bias": torch.zeros(64),
        f"{LAYER}.self_attn.rotary_emb.inv_freq": torch.ones(8),
        f"{LAYER}.self_attn.masked_bias": torch.tensor(-1e4),
        "score.weight": torch.ones(2, 64),
        "vision.weight": torch.ones(3),
    }
    assert opened({**harmless, **predictor}) == set(tensors)
