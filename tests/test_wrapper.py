"""Decoders inside models of several parts: their weights and logits against the whole model's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fmedge_converters import wrapper as wrapper_module
from fmedge_converters.checkpoint import Checkpoint
from fmedge_converters.decoder import empty_model, quiet_libraries
from fmedge_converters.export import export
from fmedge_converters.export_options import ExportOptions
from fmedge_converters.reference import open_reference
from fmedge_converters.source import open_source
from fmedge_runtimes.errors import SourceError
from fmedge_runtimes.load import load
from fmedge_runtimes.sampling import Sampling
from safetensors.torch import save_file
from tiny import tiny_config
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

OTHER_PARTS: dict[str, int] = {
    "image_size": 28,
    "patch_size": 14,
    "depth": 2,
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "embed_dim": 64,
    "out_hidden_size": 64,
    "projection_dim": 64,
    "encoder_layers": 2,
    "d_model": 64,
    "encoder_ffn_dim": 64,
    "encoder_attention_heads": 4,
    "num_layers": 2,
    "num_heads": 4,
    "vision_output_dim": 64,
    "mlp_ratio": 2,
}
"""Sizes of what is not the decoder."""
FEW = ("mistral3", "gemma3", "qwen3_5_moe")
"""The decoder of another model, one of its own, experts and states."""
LARGEST = 60_000_000
SCALED = ("aya_vision", "cohere2_vision")
"""Of these, transformers' whole model leaves out the scale that the decoder's own class gives its logits."""


def tiny_whole(model_type: str) -> PretrainedConfig:
    config = tiny_config(model_type)
    text = config.get_text_config(decoder=True)
    parts = [getattr(config, name, None) for name in config.sub_configs]
    for part in [item for item in parts if isinstance(item, PretrainedConfig) and item is not text]:
        for name, size in OTHER_PARTS.items():
            if isinstance(getattr(part, name, None), int | float):
                setattr(part, name, size)
    return config


def random_whole(model_type: str, folder: Path) -> PreTrainedModel:
    config = tiny_whole(model_type)
    auto = AutoModelForMultimodalLM if model_type in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES else AutoModelForCausalLM
    if sum(value.numel() for value in empty(auto, config).parameters()) > LARGEST:
        raise ValueError(f"{model_type} cannot be tiny")
    with quiet_libraries():
        model = auto.from_config(config, attn_implementation="eager").eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        model.save_pretrained(folder)
    return model


def empty(auto: Any, config: PretrainedConfig) -> PreTrainedModel:
    with quiet_libraries(), torch.device("meta"):
        return auto.from_config(config)


ROW = [5, 6, 7, 8, 9, 10]


def logits_of_the_whole(model_type: str, folder: Path) -> torch.Tensor:
    whole = random_whole(model_type, folder)
    ids = torch.tensor([ROW])
    with torch.no_grad():
        return whole(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]


def compare(model_type: str, folder: Path, wanted: torch.Tensor) -> None:
    # The decoder as the comparison with PyTorch takes it: built alone, with the weights as fmedge reads them.
    source = open_source(str(folder))
    rows: dict[int, np.ndarray] = {}
    with open_reference(source, 0, 64) as reference:
        reference.each_logits([ROW], rows.__setitem__)
    found = torch.from_numpy(rows[0])
    if model_type in SCALED:
        found = found / source.config.logit_scale
    torch.testing.assert_close(found, wanted, atol=5e-6, rtol=1e-5, msg=lambda text: f"{model_type}: {text}")


@pytest.mark.parametrize("model_type", FEW)
def test_the_decoder_computes_what_the_whole_computes(model_type: str, tmp_path: Path) -> None:
    compare(model_type, tmp_path / "model", logits_of_the_whole(model_type, tmp_path / "model"))


def wrapping() -> list[str]:
    found = []
    for model_type in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES:
        try:
            config = AutoConfig.for_model(model_type)
            if config.get_text_config(decoder=True) is not config:
                found.append(model_type)
        except Exception:
            continue
    return found


@pytest.mark.slow
def test_every_wrapper_that_can_be_tiny(tmp_path: Path) -> None:
    same, refused, not_built = [], [], []
    for model_type in wrapping():
        try:
            wanted = logits_of_the_whole(model_type, tmp_path / model_type)
        except Exception:
            not_built.append(model_type)  # or it wants an image in every call, or other sizes than the tiny ones
            continue
        try:
            compare(model_type, tmp_path / model_type, wanted)
        except SourceError as error:
            refused.append((model_type, str(error)))
        else:
            same.append(model_type)
    assert len(same) >= 40, (same, refused, not_built)


@pytest.mark.medium
def test_a_bundle_of_a_decoder_in_a_wrapper(tmp_path: Path) -> None:
    whole = random_whole("mistral3", tmp_path / "model")
    made = export(ExportOptions(str(tmp_path / "model"), tmp_path / "bundle", verify="none"))
    assert made.manifest.source.architecture == "mistral"
    prompt = torch.tensor([list(range(3, 20))])
    with quiet_libraries():
        wanted = whole.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    with load(made.folder) as model:
        (found,) = model.generate(prompt[0].tolist(), Sampling(max_new_tokens=12, ignore_eos=True))
    assert list(found.tokens) == wanted[0, prompt.shape[1] :].tolist()


def test_a_decoder_is_read_by_its_own_rules_where_the_whole_cannot_be_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = random_whole("qwen3_5", tmp_path / "model")
    monkeypatch.setattr(wrapper_module, "_empty", lambda _: None)
    source = open_source(str(tmp_path / "model"))
    wanted = whole.state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    with Checkpoint(source.files, np.dtype(np.float32)) as checkpoint:
        found = checkpoint.weights(empty_model(source.config, torch.float32))[name].array()
    assert np.array_equal(found, wanted[name.replace("model.", "model.language_model.")].numpy())


def test_an_adapter_of_the_whole_is_merged_into_its_decoder(tmp_path: Path) -> None:
    random_whole("mistral3", tmp_path / "model")
    a, b = torch.randn(2, 64), torch.randn(64, 2)
    module = "model.language_model.layers.0.self_attn.q_proj"
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    factors = {f"base_model.model.{module}.lora_{part}.weight": value for part, value in (("A", a), ("B", b))}
    save_file(factors, tmp_path / "lora" / "adapter_model.safetensors")

    def weight(adapter: str | None) -> np.ndarray:
        source = open_source(str(tmp_path / "model"), adapter=adapter)
        with Checkpoint(source.files, np.dtype(np.float32)) as checkpoint:
            weights = checkpoint.weights(empty_model(source.config, torch.float32))
            return weights["model.layers.0.self_attn.q_proj.weight"].array()

    np.testing.assert_allclose(weight(str(tmp_path / "lora")), weight(None) + (2 * b @ a).numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (lambda: tiny_config("qwen2_5_vl"), "no causal language model of that decoder alone"),
        (lambda: AutoConfig.for_model("udop"), "an encoder with a decoder behind it"),
    ],
    ids=["no-class-of-its-own", "encoder-decoder"],
)
def test_wrappers_that_are_refused(config: Callable[[], PretrainedConfig], words: str, tmp_path: Path) -> None:
    with quiet_libraries():
        config().save_pretrained(tmp_path)
    with pytest.raises(SourceError, match=words):
        open_source(str(tmp_path))
