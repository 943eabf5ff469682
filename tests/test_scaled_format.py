"""fp8 checkpoints: what fmedge reads is what transformers and compressed-tensors dequantize, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fmedge_converters.checkpoint import Checkpoint
from fmedge_converters.decoder import empty_model, quiet_libraries
from fmedge_converters.export import export
from fmedge_converters.export_options import ExportOptions
from fmedge_converters.source import open_source
from fmedge_converters.weight import Weight
from fmedge_runtimes.errors import SourceError
from fmedge_runtimes.load import load
from fmedge_runtimes.sampling import Sampling
from models import greedy, make_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

Tensors = dict[str, torch.Tensor]
Store = Callable[[str, torch.Tensor], Tensors]

BLOCKS = {"quant_method": "fp8", "weight_block_size": [32, 16], "activation_scheme": "dynamic"}
WHOLE = {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}
EXPONENTS = {"quant_method": "mxfp8", "weight_block_size": [1, 32], "activation_scheme": "dynamic"}
MOE = {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2}


def compressed(strategy: str) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True}
    activations = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "config_groups": {"all": group},
    }


def rounded(
    weight: torch.Tensor, rows: int, columns: int, kind: torch.dtype = torch.float8_e4m3fn
) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix in fp8 and random scales for its blocks."""
    height, width = weight.shape
    generator = torch.Generator().manual_seed(height * width)
    scale = torch.rand((-(-height // rows), -(-width // columns)), generator=generator) * 0.01 + 0.001
    whole = scale.repeat_interleave(rows, 0)[:height].repeat_interleave(columns, 1)[:, :width]
    return (weight / whole).clamp(-448, 448).to(kind), scale


def by_blocks(rows: int, columns: int, kind: torch.dtype = torch.float8_e4m3fn) -> Store:
    def store(name: str, weight: torch.Tensor) -> Tensors:
        codes, scale = rounded(weight, rows, columns, kind)
        return {name: codes, f"{name}_scale_inv": scale}

    return store


def by_rows(dtype: torch.dtype) -> Store:
    def store(name: str, weight: torch.Tensor) -> Tensors:
        codes, scale = rounded(weight, 1, weight.shape[1])
        return {name: codes, f"{name}_scale": scale.to(dtype)}

    return store


def whole(name: str, weight: torch.Tensor) -> Tensors:
    codes, scale = rounded(weight, *weight.shape)
    return {name: codes, f"{name}_scale_inv": scale[0, 0], name.replace("weight", "activation_scale"): torch.ones(())}


def exponents(name: str, weight: torch.Tensor) -> Tensors:
    codes, _ = rounded(weight, 1, 32)
    bytes_ = torch.randint(115, 122, (weight.shape[0], weight.shape[1] // 32), dtype=torch.uint8)
    return {name: codes, f"{name}_scale_inv": bytes_}


def quantized(folder: Path, store: Store, settings: dict[str, Any]) -> Path:
    """Rewrite the projections of a checkpoint in fp8."""
    tensors: Tensors = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            tensors |= store(name, weight)
        else:
            tensors[name] = weight
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": settings}))
    return folder


def read(folder: Path, dtype: torch.dtype) -> dict[str, Weight]:
    """The weights; the files stay open as long as they are used."""
    source = open_source(str(folder))
    kind = torch.empty(0, dtype=dtype).numpy().dtype
    return Checkpoint(source.files, kind).weights(empty_model(source.config, dtype))


CASES: dict[str, tuple[str, dict[str, Any], Store, dict[str, Any]]] = {
    "blocks": ("llama", {}, by_blocks(32, 16), BLOCKS),
    "blocks-e5m2": ("llama", {}, by_blocks(32, 16, torch.float8_e5m2), BLOCKS),
    "blocks-of-experts": ("qwen3_moe", MOE, by_blocks(32, 16), BLOCKS),
    "tensors": ("llama", {}, whole, WHOLE),
    "exponents": ("llama", {}, exponents, EXPONENTS),
    "compressed-rows": ("llama", {}, by_rows(torch.float32), compressed("channel")),
    "compressed-rows-bf16": ("llama", {}, by_rows(torch.bfloat16), compressed("channel")),
    "compressed-experts": ("qwen3_moe", MOE, by_rows(torch.float32), compressed("channel")),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_that_transformers_dequantizes(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    kind, sizes, store, settings = CASES[case]
    folder = quantized(make_model(tmp_path / "model", kind, **sizes), store, settings)
    options = {}
    if settings["quant_method"] == "compressed-tensors":
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    with quiet_libraries():
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    weights = read(folder, dtype)
    assert set(weights) == {name for name, _ in reference.named_parameters(remove_duplicate=False)}
    for name, parameter in reference.named_parameters(remove_duplicate=False):
        # transformers leaves tensors beside the quantized ones in the type they are stored in.
        assert np.array_equal(weights[name].array(), parameter.detach().to(dtype).numpy()), name


def test_blocks_that_do_not_divide_the_rows_count_from_the_first(tmp_path: Path) -> None:
    """DeepSeek-V3 has 576 rows in blocks of 128: the last block is half empty."""
    settings = {**BLOCKS, "weight_block_size": [24, 24]}
    folder = make_model(tmp_path / "model")
    name = "model.layers.0.mlp.up_proj.weight"
    plain = load_file(folder / "model.safetensors")[name]  # [128, 64]
    codes, scale = rounded(plain, 24, 24)
    weights = read(quantized(folder, by_blocks(24, 24), settings), torch.float32)
    for row, column in ((0, 0), (23, 23), (24, 24), (127, 63)):
        wanted = codes[row, column].float() * scale[row // 24, column // 24]
        assert weights[name].read(row, row + 1)[0, column] == wanted.item()
    assert np.array_equal(weights[name].read(17, 63), weights[name].array()[17:63])


def test_rows_are_dequantized_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = quantized(make_model(tmp_path / "model"), by_blocks(32, 16), BLOCKS)
    name = "model.layers.0.mlp.up_proj.weight"
    wanted = read(folder, torch.float32)[name].array()
    monkeypatch.setattr("fmedge_converters.formats.scaled.CHUNK_BYTES", 5 * 64 * 4)  # five rows at a time
    assert np.array_equal(read(folder, torch.float32)[name].array(), wanted)


def test_fp8_without_scales_is_a_float_like_others(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    small = tensors[name].to(torch.float8_e4m3fn)
    save_file({**tensors, name: small}, folder / "model.safetensors")
    assert np.array_equal(read(folder, torch.float32)[name].array(), small.float().numpy())


def without(part: str) -> Store:
    def store(name: str, weight: torch.Tensor) -> Tensors:
        return {key: tensor for key, tensor in by_blocks(32, 16)(name, weight).items() if not key.endswith(part)}

    return store


def wide(name: str, weight: torch.Tensor) -> Tensors:
    return {**by_blocks(32, 16)(name, weight), f"{name}_scale_inv": torch.ones(3, 5)}


@pytest.mark.parametrize(
    ("store", "settings", "words"),
    [
        (without("_scale_inv"), BLOCKS, "stored as F8_E4M3, but its scale .*weight_scale_inv.* is missing"),
        (wide, BLOCKS, r"\[3, 5\] of its scale .* does not divide it"),
        (by_blocks(32, 16), {}, "8 bits with a scale .*no quantization_config"),
        (by_blocks(32, 16), {"quant_method": "bitsandbytes"}, "quantized by bitsandbytes, which fmedge does not read"),
        (by_blocks(32, 16), {"quant_method": "compressed-tensors", "config_groups": [1]}, "makes no sense"),
        (by_blocks(32, 16), "fp8", "makes no sense"),
    ],
    ids=["no-scale", "other-shape", "no-config", "other-method", "nonsense", "not-a-table"],
)
def test_fp8_checkpoints_that_contradict_themselves(
    store: Store, settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    folder = quantized(make_model(tmp_path / "model"), store, settings)
    with pytest.raises(SourceError, match=words):
        read(folder, torch.float32)


@pytest.mark.medium
def test_a_bundle_of_an_fp8_checkpoint_in_a_pickle(tmp_path: Path) -> None:
    folder = quantized(make_model(tmp_path / "model"), by_blocks(32, 16), BLOCKS)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    bundle = export(ExportOptions(str(folder), tmp_path / "bundle", allow_pickle=True, verify="none")).folder
    prompt = list(range(1, 20))
    with load(bundle) as model:
        (found,) = model.generate(prompt, Sampling(max_new_tokens=16, ignore_eos=True))
    assert list(found.tokens) == greedy(folder, prompt, 16)
