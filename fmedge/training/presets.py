"""Sizes to train: a table of architectures with the batch and the learning rate that suit them.

Widths are multiples of 128, so that int4 blocks of 32, 64 or 128 divide them.
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
        "tie_word_embeddings": True,
    }
