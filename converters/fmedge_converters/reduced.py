"""A small model of the same architecture with random weights, for the proof that the graph is right.

Layers, vocabulary, MLPs and the number of experts shrink; every kind of layer, the head sizes, how many experts a token
has and all constants of the architecture stay.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from fmedge_runtimes.errors import SourceError
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from fmedge_converters.decoder import empty_model, quiet_libraries, text_config
from fmedge_converters.first_line import first_line

VOCABULARY = 512
MLP = 512
MIN_LAYERS = 2
WINDOW = 16
"""Shorter than the prompts of the comparison, so that a wrong window shows."""
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "attention_window_size")
LAYER_COUNTS = ("num_blocks",)
"""Which configurations have beside num_hidden_layers."""
MLP_SIZES = (
    "intermediate_size",
    "moe_intermediate_size",
    "ffn_dim",
    "n_inner",
    "shared_expert_intermediate_size",
)
EXPERTS = 8
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOSEN_COUNTS = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts")
GROUP_COUNTS = ("n_group", "num_expert_group")
TAKEN_COUNTS = ("topk_group",)
"""Experts, how many of them a token has; groups of experts, and how many of those the router takes."""
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id")


def reduced_config(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration with few layers, a small vocabulary and small MLPs.

    Raises SourceError when transformers cannot build the model.
    """
    layers = text_config(config).num_hidden_layers
    keep = _layers_to_keep(config, layers)
    while True:
        small = _with_layers(config, layers, keep)
        try:
            empty_model(small, torch.float32)
        except SourceError:
            # Some layers need another of their kind: they share its weights.
            if keep >= layers:
                raise
            keep += 1
        else:
            return small


def _with_layers(config: PretrainedConfig, layers: int, keep: int) -> PretrainedConfig:
    small = copy.deepcopy(config)
    text = text_config(small)
    for name, value in list(vars(text).items()):
        if isinstance(value, list | tuple) and len(value) == layers and not name.startswith("_"):
            setattr(text, name, type(value)(value[:keep]))
    text.num_hidden_layers = keep
    for name in LAYER_COUNTS:
        if getattr(text, name, None) == layers:
            setattr(text, name, keep)
    for names, limit in ((WINDOWS, WINDOW), (MLP_SIZES, MLP), (EXPERT_COUNTS, _experts_to_keep(text))):
        for name in names:
            size = getattr(text, name, None)
            if isinstance(size, int) and size > limit:
                setattr(text, name, limit)
    text.vocab_size = min(text.vocab_size, VOCABULARY)
    for holder in (small, text):
        for name in TOKEN_IDS:
            value = getattr(holder, name, None)
            if isinstance(value, list) or (isinstance(value, int) and value >= text.vocab_size):
                setattr(holder, name, 0)
    return small


def _experts_to_keep(text: PretrainedConfig) -> int:
    """More experts than a token has, in as many groups as before and with enough of them in each."""
    chosen, groups, taken = (
        max((size for name in names if isinstance(size := getattr(text, name, None), int)), default=1)
        for names in (CHOSEN_COUNTS, GROUP_COUNTS, TAKEN_COUNTS)
    )
    # A group is rated by the sum of its two best experts.
    return groups * max(2, math.ceil(max(EXPERTS, 2 * chosen) / groups), math.ceil(chosen / taken))


def _layers_to_keep(config: PretrainedConfig, layers: int) -> int:
    """As many layers as it takes to see every kind of them. Lists in the configuration with an entry for each layer
    tell kinds apart, and so do the modules that layers are made of."""
    lists: list[Sequence[Any]] = [
        value
        for value in vars(text_config(config)).values()
        if isinstance(value, list | tuple)
        and len(value) == layers
        and all(isinstance(i, str | int) for i in value)
        and list(value) != list(range(layers))  # a list of layers, not of their kinds
    ]
    lists += [
        [tuple(type(part).__name__ for part in layer.modules()) for layer in module]
        for module in empty_model(config, torch.float32).modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == layers
    ]
    kinds = list(zip(*lists, strict=True))
    needed = max((kinds.index(kind) + 1 for kind in set(kinds)), default=0)
    return min(layers, max(MIN_LAYERS, needed))


def write_random_model(config: PretrainedConfig, folder: Path, seed: int) -> PreTrainedModel:
    """Make the model with random weights, save it as safetensors, and return it in fp32 for comparison.

    The weights are spread so that greedy decoding has clear winners.
    """
    try:
        with quiet_libraries():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=torch.float32, attn_implementation="eager"
            ).eval()
    except Exception as error:
        raise SourceError(f"transformers cannot build a small {config.model_type}: {first_line(error)}") from error
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(noise * 0.1)
    with quiet_libraries():
        model.save_pretrained(folder)
    return model
