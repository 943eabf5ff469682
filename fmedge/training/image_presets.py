"""Sizes of text-to-image models to train, with the batch and the learning rate that suit them.

All are `PRXTransformer2DModel`s of diffusers over patches of pixels, and `CLIPTextModel`s of transformers, trained
together. What a patch attends to by its place alone is the captions' tokens, whose keys are not rotated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from fmedge_runtimes.errors import TrainingError


@dataclass(frozen=True, slots=True)
class ImagePreset:
    """An architecture, and how to train it."""

    width: int
    layers: int
    heads: int
    mlp_ratio: float
    """Of the gated feed-forward layer's inner width to `width`."""
    patch: int
    """Pixels of a patch's side."""
    text_width: int
    text_layers: int
    text_heads: int
    batch: int
    """Pictures of one step on one device."""
    learning_rate: float


IMAGE_PRESETS: Mapping[str, ImagePreset] = MappingProxyType(
    {
        "tiny": ImagePreset(128, 4, 4, 2.5, 8, 128, 1, 4, batch=32, learning_rate=2e-3),
        "small": ImagePreset(384, 8, 6, 2.5, 8, 256, 4, 4, batch=64, learning_rate=5e-4),
        "base": ImagePreset(768, 12, 12, 2.5, 8, 512, 6, 8, batch=64, learning_rate=2e-4),
    }
)


def image_preset_named(name: str) -> ImagePreset:
    """Look a preset up."""
    if name not in IMAGE_PRESETS:
        raise TrainingError(f'there is no preset "{name}": choose one of {", ".join(IMAGE_PRESETS)}')
    return IMAGE_PRESETS[name]
