"""The reference that reads its layers when they run computes what the ordinary model does."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import documented
from fmedge_converters import reference as reference_module
from fmedge_converters import streamed_model
from fmedge_converters import weight as weight_module
from fmedge_converters.checkpoint import Checkpoint, Files
from fmedge_converters.decoder import empty_model, quiet_libraries
from fmedge_converters.pieces import NotLoadedError
from fmedge_converters.reduced import write_random_model
from fmedge_converters.reference import ResidentReference, open_reference
from fmedge_converters.source import open_source
from fmedge_converters.streamed_model import StreamedModel
from fmedge_converters.weight import Weight, weight_from_array
from fmedge_runtimes.errors import SourceError
from models import make_model
from tiny import tiny_config
from transformers import AutoConfig, AutoModelForCausalLM

ROWS = [[5, 3, 7], list(range(1, 40)), [9], [4] * 17]

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True, "dtype": torch.bfloat16},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},  # transposed weights, learned positions
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phi": {},  # a head with a bias
    "gemma3_text": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
}


def streamed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[int, np.ndarray]:
    monkeypatch.setattr(reference_module, "RESIDENT_BYTES", 0)
    found: dict[int, np.ndarray] = {}
    with open_reference(open_source(str(folder)), 1, 64) as reference:
        assert "layer by layer" in reference.how
        reference.each_logits(ROWS, found.__setitem__)
    return found


@pytest.mark.parametrize("pieces", [0, 1 << 30], ids=["embeddings in pieces", "embeddings whole"])
@pytest.mark.parametrize("model_type", MODELS)
def test_logits_are_those_of_the_model_in_memory(
    model_type: str, pieces: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed_model, "PIECES_BYTES", pieces)
    monkeypatch.setattr(weight_module, "CHUNK_BYTES", 1 << 12)
    folder = make_model(tmp_path / "model", model_type, **MODELS[model_type])
    with quiet_libraries(), torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        wanted = [model(input_ids=torch.tensor([row])).logits[0].numpy() for row in ROWS]
    found = streamed(folder, monkeypatch)
    assert sorted(found) == [0, 1, 2, 3]
    for number, logits in enumerate(wanted):
        np.testing.assert_allclose(found[number], logits, atol=1e-6, rtol=1e-6)


EXACT = [model_type for model_type, kind in documented().items() if kind == "exact"]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", EXACT)
def test_every_architecture(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed_model, "PIECES_BYTES", 0)
    whole = write_random_model(tiny_config(model_type), tmp_path, seed=0)
    wanted: dict[int, np.ndarray] = {}
    ResidentReference(whole, 64).each_logits(ROWS, wanted.__setitem__)
    found = streamed(tmp_path, monkeypatch)
    for number, logits in wanted.items():
        np.testing.assert_allclose(found[number], logits, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def llama_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("streamed") / "model", num_hidden_layers=3)


def opened(folder: Path) -> tuple[Any, dict[str, Any]]:
    model = empty_model(AutoConfig.from_pretrained(folder), torch.float32)
    with Checkpoint(Files(folder), np.dtype(np.float32)) as checkpoint:
        weights = checkpoint.weights(model)
        return model, {name: weight_from_array(weight.array()) for name, weight in weights.items()}


def test_one_part_has_its_weights_at_a_time_and_is_read_once(llama_model: Path) -> None:
    model, weights = opened(llama_model)
    read: list[str] = []

    def counting(name: str, weight: Weight) -> Weight:
        def count(start: int, stop: int) -> Any:
            read.append(name)
            loaded.append(
                {name.split(".layers.")[-1][0] for name, value in model.named_parameters() if not value.is_meta}
            )
            return weight.read(start, stop)

        return replace(weight, read=count)

    loaded: list[set[str]] = []
    model_with = StreamedModel(model, {name: counting(name, weight) for name, weight in weights.items()})
    rows: list[int] = []
    model_with.run(ROWS, lambda number, _: rows.append(number))
    assert rows == [0, 1, 2, 3]
    assert sorted(read) == sorted(weights)
    assert max(map(len, loaded)) == 1
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("pieces", [0, 1 << 30])
def test_weights_that_are_used_without_their_module(
    pieces: int, llama_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed_model, "PIECES_BYTES", pieces)

    class Borrowing(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module, owner: torch.nn.Module) -> None:
            super().__init__()
            self.inner, self.owner = inner, [owner]

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.inner(hidden) + self.owner[0].weight.mean()

    model, weights = opened(llama_model)
    model.model.norm = Borrowing(model.model.norm, model.model.embed_tokens)
    weights["model.norm.inner.weight"] = weights["model.norm.weight"]
    found: dict[int, torch.Tensor] = {}
    StreamedModel(model, weights).run(ROWS, found.__setitem__)
    assert sorted(found) == [0, 1, 2, 3]
    assert not any(logits.is_meta for logits in found.values())


@pytest.mark.parametrize("pieces", [0, 1 << 30])
def test_inputs_that_follow_the_weights_to_their_device(
    pieces: int, llama_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed_model, "PIECES_BYTES", pieces)

    class Following(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            assert self.inner.weight.dtype == torch.float32
            return self.inner(ids.to(self.inner.weight.device))

    model, weights = opened(llama_model)
    wanted: dict[int, torch.Tensor] = {}
    StreamedModel(model, weights).run(ROWS, wanted.__setitem__)
    model.model.embed_tokens = Following(model.model.embed_tokens)
    weights["model.embed_tokens.inner.weight"] = weights.pop("model.embed_tokens.weight")
    found: dict[int, torch.Tensor] = {}
    StreamedModel(model, weights).run(ROWS, found.__setitem__)
    assert all(torch.equal(found[number], logits) for number, logits in wanted.items())
    assert sorted(found) == sorted(wanted)


def test_what_goes_wrong_rises_and_no_thread_stays(llama_model: Path) -> None:
    model, weights = opened(llama_model)
    before = threading.active_count()

    def damaged(_start: int, _stop: int) -> Any:
        raise SourceError("cannot read")

    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(SourceError, match="cannot read"):
        StreamedModel(model, {**weights, name: replace(weights[name], read=damaged)}).run(ROWS, lambda *_: None)
    with pytest.raises(ZeroDivisionError):
        StreamedModel(model, weights).run(ROWS, lambda *_: 1 / 0)
    layers = model.model.layers
    layers[0].register_forward_hook(lambda *_: layers[2].mlp.up_proj.weight.mean())
    with pytest.raises(NotLoadedError, match="mean"):
        StreamedModel(model, weights).run(ROWS, lambda *_: None)
    assert threading.active_count() == before
