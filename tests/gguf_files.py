"""GGUF files of transformers' models, written as llama.cpp's converter writes them, by the `gguf` package."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file

ARCHITECTURES = {"gemma3_text": "gemma3", "mistral": "llama", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe"}
"""GGUF's names of model types, where they differ."""
NORMS_PLUS_ONE = ("gemma2", "gemma3_text", "nemotron")
ROTATED = ("llama", "mistral")
TRANSPOSED = ("attn_qkv.weight", "ffn_down.weight", "ffn_up.weight", "attn_output.weight")


def interleaved(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows in the order of llama.cpp's rotary embedding, which pairs neighbours where transformers pairs halves."""
    split = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(array.shape))


def write_gguf(
    folder: Path,
    file: Path,
    form: str,
    forms: Mapping[str, str] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """The model of a folder as GGUF, its matrices in a type of ggml; `forms` gives those of single tensors."""
    config = json.loads((folder / "config.json").read_text())
    model_type = config["model_type"]
    architecture = ARCHITECTURES.get(model_type, model_type)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("tiny mistral" if model_type == "mistral" else "tiny")
    writer.add_license("apache-2.0")
    _add_sizes(writer, config, architecture)
    _add_tokenizer(writer, folder)
    for key, value in (metadata or {}).items():
        name = f"{architecture}.{key}"
        writer.add_string(name, value) if isinstance(value, str) else (
            writer.add_float32(name, value) if isinstance(value, float) else writer.add_uint32(name, value)
        )
    layers = config.get("num_hidden_layers", config.get("n_layer"))
    kind = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(kind, layers)
    for name, array in _stacked(load_file(folder / "model.safetensors")).items():
        module, _, part = name.rpartition(".")
        stored = f"{names.get_name(module)}.{part}"
        changed = _as_llama_cpp_has_it(name, stored, array, config)
        quantizable = changed.ndim > 1 and not name.endswith("conv.weight")
        _add(writer, stored, changed, (forms or {}).get(stored, form if quantizable else "F32"))
    for name, array in (extra or {}).items():
        _add(writer, name, array, "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _as_llama_cpp_has_it(name: str, stored: str, array: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    model_type = config["model_type"]
    if model_type in ROTATED and ("q_proj" in name or "k_proj" in name):
        return interleaved(array, config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"])
    if model_type in NORMS_PLUS_ONE and name.endswith("norm.weight"):
        return array + 1
    if model_type == "gpt2" and stored.endswith(TRANSPOSED):
        return np.ascontiguousarray(array.T)
    return array.squeeze() if name.endswith("conv.weight") or "shared_expert_gate" in name else array


def _stacked(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """The tensors, those of a layer's experts as one."""
    result: dict[str, np.ndarray] = {}
    for name in sorted(tensors, key=lambda name: [int(part) if part.isdigit() else 0 for part in name.split(".")]):
        array = tensors[name].float().numpy()
        whole = re.sub(r"\.experts\.\d+\.", ".experts.", name)
        result[whole] = (
            array
            if whole == name
            else np.concatenate([result.get(whole, np.empty((0, *array.shape), np.float32)), array[None]])
        )
    return result


def _add(writer: gguf.GGUFWriter, name: str, array: np.ndarray, form: str) -> None:
    if form == "F32":
        writer.add_tensor(name, np.ascontiguousarray(array, np.float32))
    elif form == "F16":
        writer.add_tensor(name, array.astype(np.float16))
    else:
        kind = gguf.GGMLQuantizationType[form]
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)


def _add_sizes(writer: gguf.GGUFWriter, config: Mapping[str, Any], architecture: str) -> None:
    heads = config.get("num_attention_heads", config.get("n_head"))
    hidden = config.get("hidden_size", config.get("n_embd"))
    head_dim = config.get("head_dim") or hidden // heads
    rope = config.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    writer.add_context_length(config.get("max_position_embeddings", config.get("n_positions")))
    writer.add_embedding_length(hidden)
    writer.add_block_count(config.get("num_hidden_layers", config.get("n_layer")))
    writer.add_feed_forward_length(config.get("intermediate_size") or 4 * hidden)
    writer.add_head_count(heads)
    writer.add_vocab_size(config["vocab_size"])
    if "num_key_value_heads" in config:
        kinds = config.get("layer_types") if architecture == "lfm2" else None
        count = config["num_key_value_heads"]
        writer.add_head_count_kv([count * (kind != "conv") for kind in kinds] if kinds else count)
    if architecture == "lfm2":
        writer.add_shortconv_l_cache(config["conv_L_cache"])
    if architecture in ("gpt2", "starcoder2", "stablelm"):
        epsilon = config.get("layer_norm_epsilon", config.get("norm_epsilon", config.get("layer_norm_eps")))
        writer.add_layer_norm_eps(epsilon)
    else:
        writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", config.get("norm_eps")))
    if rope:
        writer.add_rope_freq_base(float(rope["rope_theta"]))
        writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1)))
    experts = config.get("num_experts") or config.get("num_local_experts")
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if config.get("shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    if config.get("head_dim"):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path) -> None:
    if not (folder / "tokenizer.json").is_file():
        writer.add_tokenizer_model("no_vocab")
        writer.add_pad_token_id(0)
        return
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(vocabulary["<|begin|>"])
    writer.add_eos_token_id(vocabulary["<|end|>"])
    writer.add_pad_token_id(vocabulary["<|end|>"])
    writer.add_add_bos_token(False)
    template = folder / "chat_template.jinja"
    if template.is_file():
        writer.add_chat_template(template.read_text())
