"""LoRA adapters as PEFT saves them, merged while the weights are read; PEFT's own merge is the reference."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fmedge_converters.checkpoint import Checkpoint
from fmedge_converters.decoder import empty_model, quiet_libraries
from fmedge_converters.export import export
from fmedge_converters.export_options import ExportOptions
from fmedge_converters.reference import open_reference
from fmedge_converters.source import open_source
from fmedge_runtimes.errors import SourceError
from fmedge_runtimes.load import load
from fmedge_runtimes.sampling import Sampling
from models import add_tokenizer, make_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

FP32 = np.dtype(np.float32)


def make_adapter(base: Path, folder: Path, **settings: Any) -> PreTrainedModel:
    """Save an adapter with random weights; the base model with it merged by PEFT."""
    from peft import LoraConfig, PeftModel, get_peft_model

    with warnings.catch_warnings(), quiet_libraries(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        tuned = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, **settings}))
        with torch.no_grad():
            for parameter in tuned.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape) * 0.05)
        tuned.save_pretrained(folder)
        # Read again, so that what is compared is what the files say.
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        return PeftModel.from_pretrained(model, folder).merge_and_unload()


def merged(base: Path, adapter: Path) -> dict[str, np.ndarray]:
    """What fmedge reads."""
    source = open_source(str(base), adapter=str(adapter))
    model = empty_model(source.config, torch.float32)
    with Checkpoint(source.files, FP32) as checkpoint:
        return {name: weight.array() for name, weight in checkpoint.weights(model).items()}


def check(base: Path, adapter: Path, reference: PreTrainedModel) -> None:
    found = merged(base, adapter)
    wanted = dict(reference.named_parameters(remove_duplicate=False))
    assert set(wanted) <= set(found)
    for name, parameter in wanted.items():
        np.testing.assert_allclose(found[name], parameter.detach().numpy(), rtol=1e-5, atol=1e-6, err_msg=name)
    plain = load_file(base / "model.safetensors")
    assert any(name in plain and not np.array_equal(found[name], plain[name].numpy()) for name in found)


ATTENTION = ["q_proj", "v_proj"]
MOE = {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "attention": ("llama", {}, {"target_modules": ATTENTION}),
    "every-linear": ("llama", {}, {"target_modules": "all-linear"}),
    "rank-stabilised": ("llama", {}, {"target_modules": ATTENTION, "use_rslora": True}),
    "patterns": (
        "llama",
        {},
        {"target_modules": ATTENTION, "rank_pattern": {"layers.1.*v_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    ),
    "dora": ("llama", {}, {"target_modules": [*ATTENTION, "down_proj"], "use_dora": True}),
    "embedding": ("llama", {}, {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
    "dora-embedding": ("llama", {}, {"target_modules": ["embed_tokens"], "use_dora": True}),
    "saved-modules": ("llama", {}, {"target_modules": ATTENTION, "modules_to_save": ["lm_head", "norm"]}),
    "biases": ("llama", {"attention_bias": True}, {"target_modules": ATTENTION, "bias": "all"}),
    "bias-of-its-own": ("llama", {"attention_bias": True}, {"target_modules": ATTENTION, "lora_bias": True}),
    "conv1d": ("gpt2", GPT2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "conv1d-dora": ("gpt2", GPT2, {"target_modules": ["c_proj"], "fan_in_fan_out": True, "use_dora": True}),
    "untied": ("llama", {"tie_word_embeddings": True}, {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]}),
    "experts": (
        "qwen3_moe",
        MOE,
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_merged_weights_are_those_of_peft(case: str, tmp_path: Path) -> None:
    kind, sizes, settings = CASES[case]
    base = make_model(tmp_path / "base", kind, **sizes)
    check(base, tmp_path / "lora", make_adapter(base, tmp_path / "lora", **settings))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model(tmp_path_factory.mktemp("base") / "tiny", tie_word_embeddings=True, eos_token_id=0)
    return add_tokenizer(folder)


@pytest.fixture(scope="module")
def lora(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora") / "lora"
    make_adapter(base, folder, target_modules=ATTENTION)
    return folder


def edited(folder: Path, target: Path, **config: object) -> Path:
    """A copy of an adapter with other settings."""
    shutil.copytree(folder, target)
    path = target / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return target


def retensored(folder: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of an adapter with other tensors."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "adapter_model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "adapter_model.safetensors")
    return target


def test_an_adapter_on_one_of_two_tied_weights_leaves_the_other_alone(base: Path, tmp_path: Path) -> None:
    make_adapter(base, tmp_path / "lora", target_modules=["embed_tokens"])
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.model.embed_tokens.lora_embedding_{part}"].numpy() for part in "AB")
    found = merged(base, tmp_path / "lora")
    plain = load_file(base / "model.safetensors")["model.embed_tokens.weight"].numpy()
    np.testing.assert_allclose(found["model.embed_tokens.weight"], plain + (b @ a).T * 1.5, atol=1e-6)
    assert np.array_equal(found["lm_head.weight"], plain)


def test_weights_that_an_adapter_keeps_tied_are_changed_once(base: Path, tmp_path: Path) -> None:
    """PEFT's model computes with one update. (Its merge adds it to the shared weight once for each name.)"""
    make_adapter(base, tmp_path / "lora", target_modules=["embed_tokens"], ensure_weight_tying=True)
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.model.embed_tokens.lora_embedding_{part}"].numpy() for part in "AB")
    plain = load_file(base / "model.safetensors")["model.embed_tokens.weight"].numpy()
    found = merged(base, tmp_path / "lora")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        np.testing.assert_allclose(found[name], plain + (b @ a).T * 1.5, atol=1e-6)
    assert open_source(str(base), adapter=str(tmp_path / "lora")).config.tie_word_embeddings


def test_experts_are_changed_one_by_one_when_the_adapter_names_them_so(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "base", "qwen3_moe", **MOE)
    make_adapter(folder, tmp_path / "attention", target_modules=["q_proj"])
    module = "model.layers.1.mlp.experts.2.up_proj"
    a, b = torch.randn(4, 64), torch.randn(32, 4)

    def only_one_expert(tensors: dict[str, torch.Tensor]) -> None:
        tensors.clear()
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b

    found = merged(folder, retensored(tmp_path / "attention", tmp_path / "lora", only_one_expert))
    plain = load_file(folder / "model.safetensors")
    fused = found["model.layers.1.mlp.experts.gate_up_proj"]  # [E, gate and up, hidden]
    np.testing.assert_allclose(fused[2, 32:], (plain[f"{module}.weight"] + b @ a * 1.5).numpy(), atol=1e-5)
    assert np.array_equal(fused[1, 32:], plain[module.replace("2.up", "1.up") + ".weight"].numpy())
    assert np.array_equal(fused[2, :32], plain[module.replace("up_proj", "gate_proj") + ".weight"].numpy())


def test_a_merge_reads_rows_and_not_the_whole_tensor(base: Path, lora: Path) -> None:
    from fmedge_converters.adapter import Adapter
    from fmedge_converters.weight import Weight, weight_from_array

    whole = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    asked: list[tuple[int, int]] = []

    def read(start: int, stop: int) -> np.ndarray:
        asked.append((start, stop))
        return whole[start:stop]

    model = empty_model(open_source(str(base)).config, torch.float32)
    with ExitStack() as stack:
        changes = Adapter(lora, stack).changes(model, FP32)
        (change,) = changes["model.layers.0.self_attn.q_proj.weight"]
        rows = change(Weight(whole.shape, FP32, read)).read(5, 9)
        assert asked == [(5, 9)]
        np.testing.assert_allclose(rows, change(weight_from_array(whole)).array()[5:9], atol=1e-6)


@pytest.mark.medium
def test_a_bundle_with_an_adapter(base: Path, lora: Path, tmp_path: Path) -> None:
    """Exported as the adapter alone, which knows its base."""
    reference = make_adapter(base, tmp_path / "again", target_modules=ATTENTION)
    prompt = torch.tensor([[5, 6, 7, 8, 9]])
    wanted = reference.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    bundle = export(ExportOptions(str(lora), tmp_path / "bundle", verify="none"))
    assert (bundle.manifest.source.id, bundle.manifest.source.adapter) == ("tiny", "lora")
    with load(bundle.folder) as model:
        (found,) = model.generate(prompt[0].tolist(), Sampling(max_new_tokens=12, ignore_eos=True))
    assert list(found.tokens) == wanted[0, 5:].tolist()


def test_an_adapter_as_the_source_is_its_base_with_it(base: Path, lora: Path) -> None:
    alone, with_base = open_source(str(lora)), open_source(str(base), adapter=str(lora))
    assert alone == replace(with_base, config=alone.config)
    assert alone.config.to_dict() == with_base.config.to_dict()
    assert not alone.loads_by_itself


def test_the_reference_of_the_comparison_has_the_adapter(base: Path, lora: Path, tmp_path: Path) -> None:
    merged_by_peft = make_adapter(base, tmp_path / "again", target_modules=ATTENTION)
    found: dict[int, np.ndarray] = {}
    with open_reference(open_source(str(base), adapter=str(lora)), 0, 64) as reference:
        reference.each_logits([[5, 6, 7, 8, 9]], found.__setitem__)
    with torch.no_grad():
        wanted = merged_by_peft(torch.tensor([[5, 6, 7, 8, 9]])).logits[0]
    torch.testing.assert_close(torch.from_numpy(found[0]), wanted, atol=1e-5, rtol=1e-5)


def test_an_adapter_brings_its_tokenizer(base: Path, lora: Path, tmp_path: Path) -> None:
    other = edited(lora, tmp_path / "lora")
    assert open_source(str(base), adapter=str(other)).tokenizer_folder == base
    add_tokenizer(other)
    assert open_source(str(base), adapter=str(other)).tokenizer_folder == other


def test_an_adapter_stored_as_a_pickle_needs_permission(base: Path, lora: Path, tmp_path: Path) -> None:
    other = edited(lora, tmp_path / "lora")
    tensors = load_file(other / "adapter_model.safetensors")
    (other / "adapter_model.safetensors").unlink()
    torch.save(tensors, other / "adapter_model.bin")
    options = ExportOptions(str(base), tmp_path / "bundle", adapter=str(other), verify="none")
    with pytest.raises(SourceError, match=r"pickle \(adapter_model.bin\).*--allow-pickle"):
        export(options)
    source = open_source(str(base), adapter=str(other), allow_pickle=True)
    with Checkpoint(source.files, FP32) as checkpoint:
        weights = checkpoint.weights(empty_model(source.config, torch.float32))
        name = "model.layers.0.self_attn.q_proj.weight"
        assert np.array_equal(weights[name].array(), merged(base, lora)[name])


REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "another-method": ({"peft_type": "IA3"}, "type IA3; fmedge merges LoRA"),
    "more-layers": ({"layer_replication": [[0, 1]]}, "layer_replication"),
    "activated": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "started from pissa_niter_4"),
    "rank": ({"r": 8}, "rank 8 for a tensor of shape .*belongs to another"),
    "no-rank": ({"r": None}, "r and lora_alpha are no numbers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_adapters_that_are_refused(case: str, base: Path, lora: Path, tmp_path: Path) -> None:
    settings, words = REFUSED[case]
    with pytest.raises(SourceError, match=words):
        merged(base, edited(lora, tmp_path / "lora", **settings))


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
DAMAGED: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "no-b": (lambda tensors: tensors.pop(KEY.format("B")), "q_proj lacks its lora_B"),
    "other-width": (lambda tensors: tensors.update({KEY.format("A"): torch.zeros(4, 48)}), "belongs to another model"),
    "no-matrix": (lambda tensors: tensors.update({KEY.format("A"): torch.zeros(4)}), "not matrices"),
    "no-such-module": (
        lambda tensors: tensors.update({KEY.replace("q_proj", "x").format(part): torch.zeros(4, 4) for part in "AB"}),
        "changes model.layers.0.self_attn.x.weight, which the model does not have",
    ),
    "unknown-part": (lambda tensors: tensors.update({KEY.format("C"): torch.zeros(4)}), "does not know what .*lora_C"),
    "resized": (
        lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.zeros(330, 64)}),
        "vocabulary was resized",
    ),
    "empty": (lambda tensors: tensors.clear(), "holds no tensors"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_adapters(case: str, base: Path, lora: Path, tmp_path: Path) -> None:
    change, words = DAMAGED[case]
    with pytest.raises(SourceError, match=words):
        merged(base, retensored(lora, tmp_path / "lora", change))


def test_refusals_of_adapter_folders(base: Path, lora: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no adapter_config.json"):
        open_source(str(base), adapter=str(base))
    with pytest.raises(SourceError, match="is an adapter itself"):
        open_source(str(lora), adapter=str(lora))
    away = edited(lora, tmp_path / "away", base_model_name_or_path=str(tmp_path / "nowhere"))
    with pytest.raises(SourceError, match=r"base model cannot be had.*--adapter"):
        open_source(str(away))
    with pytest.raises(SourceError, match="does not say its base model"):
        open_source(str(edited(lora, tmp_path / "mute", base_model_name_or_path=None)))
    empty = edited(lora, tmp_path / "empty")
    (empty / "adapter_model.safetensors").unlink()
    with pytest.raises(SourceError, match="no weights of an adapter"):
        merged(base, empty)
    (empty / "adapter_config.json").write_text("{")
    with pytest.raises(SourceError, match="not a PEFT configuration"):
        merged(base, empty)
