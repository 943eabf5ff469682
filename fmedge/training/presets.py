"""Sizes to train: a table of architectures with the batch and the learning rate that suit them.

Widths are multiples of 128, so that int4 blocks of 32, 64 or 128 divide them.

`tiny` is for a few minutes on two cores. Measured on an AMD EPYC with AVX512-BF16 and the built-in
text, in bits per byte of the held-out text after the same 307 thousand tokens (lower is better):

    batch 8, 4, 2                2.51, 2.42, 2.38; 1 gives 2.38 at a rate of 2e-3
    rate 6e-3, 3e-3              2.48, 2.42 with a batch of 4
    rate 3e-3, 1.5e-3            2.38, 2.36 with a batch of 2
    layers 6, hidden 384         2.45, 2.40 in place of 2.42, for 1.2 and 1.4 times the processor time
    vocabulary 2048, 4096        2.56, 2.42; the first takes 0.85 times the time
    vocabulary 4096, 8192        2.36, 2.19 with a batch of 2; the second takes 1.25 times the time

A million tokens (2000 steps) give 1.99 with a vocabulary of 8192, and 2.07 with 4096. `small` and
`base` follow the usual proportions and were not tuned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from fmedge_runtimes.errors import TrainingError


@dataclass(frozen=True, slots=True)
class Preset:
    """A Llama architecture, and how to train it."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int
    """Positions that the model is made for; training may use shorter sequences."""
    sequence_length: int
    batch: int
    """Sequences of one step on one device."""
    learning_rate: float
    initializer_range: float
    """Standard deviation of the first weights. 0.04 suits a narrow model: tiny reached perplexity 369 instead of 390
    in 450 steps."""


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "tiny": Preset(
            hidden=256,
            intermediate=768,
            layers=4,
            heads=4,
            kv_heads=2,
            head_dim=64,
            vocabulary=8192,
            context=512,
            sequence_length=256,
            batch=2,
            learning_rate=1.5e-3,
            initializer_range=0.04,
        ),
        "small": Preset(
            hidden=512,
            intermediate=1536,
            layers=8,
            heads=8,
            kv_heads=4,
            head_dim=64,
            vocabulary=16384,
            context=1024,
            sequence_length=512,
            batch=32,
            learning_rate=1e-3,
            initializer_range=0.02,
        ),
        "base": Preset(
            hidden=768,
            intermediate=2304,
            layers=12,
            heads=12,
            kv_heads=4,
            head_dim=64,
            vocabulary=32768,
            context=2048,
            sequence_length=1024,
            batch=32,
            learning_rate=6e-4,
            initializer_range=0.02,
        ),
    }
)


def preset_named(name: str) -> Preset:
    """Look a preset up."""
    if name not in PRESETS:
        raise TrainingError(f'there is no preset "{name}": choose one of {", ".join(PRESETS)}')
    return PRESETS[name]


def llama_config_from_preset(preset: Preset) -> dict[str, Any]:
    """What config.json says of a preset, without what the tokenizer decides."""
    return {
        "model_type": "llama",
        "hidden_size": preset.hidden,
        "intermediate_size": preset.intermediate,
        "num_hidden_layers": preset.layers,
        "num_attention_heads": preset.heads,
        "num_key_value_heads": preset.kv_heads,
        "head_dim": preset.head_dim,
        "max_position_embeddings": preset.context,
        "initializer_range": preset.initializer_range,
        "tie_word_embeddings": True,
    }
