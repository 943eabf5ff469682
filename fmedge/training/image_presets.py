"""Sizes of text-to-image models to train, with the batch and the learning rate that suit them.

All are `PRXTransformer2DModel`s of diffusers over patches of pixels, and `CLIPTextModel`s of transformers, trained
together. What a patch attends to by its place alone is the captions' tokens, whose keys are not rotated.

`tiny` is for a few minutes on two cores: 2000 steps take 185 processor seconds and follow 98 to 100 % of the built-in
captions (docs/training.md). What was tried beside it, on one busy core of an AMD EPYC with AVX512-BF16:

    times around the middle (no MORE_NOISE)     the place of a figure is learned late: after 90 s, the error of a
                                                prediction from noise alone was 0.053; 0.033 after 50 s with it (at 1.0)
    SD3Transformer2DModel, positions learned    no place was learned in 90 s, error 0.098
    weights 1 / noise level in the loss         11 % in 90 s, in place of 48 %
    bfloat16 by autocast                        8 % fewer steps in the same time, and worse pictures
    Muon for the matrices                       better outlines, a quarter fewer steps, places later

`small` and `base` follow the usual proportions and were not tuned.
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
