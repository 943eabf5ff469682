"""The optimization profiles that a bundle for TensorRT asks its engines to be built with; docs/tensorrt.md."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fmedge_runtimes.decoder import PREFILL_CHUNK
from fmedge_runtimes.engine_limits import RESIDUALS, Range, is_autoencoder, is_denoiser, rows_of_image
from fmedge_runtimes.manifest import ImageFacts, ProfileFacts
from fmedge_runtimes.pipelines.autoencoder import TILED_FROM, TOGETHER

if TYPE_CHECKING:
    from fmedge_converters.parts.part import Call

WORDS = (1, 77, 1024)
"""Tokens of an image's prompt."""
GOLDEN_SIDE = 256
"""Pixels along a side of golden images at most, where the pipeline makes other sizes than its own."""
PROMPTS, PADDED = 8, 2
"""Prompts that are encoded together at most: in windows, and by encoders that read any length."""


@dataclass(frozen=True, slots=True)
class Reach:
    """How far the engines of a pipeline go."""

    images: int = 4
    """Made together at most."""
    larger: int = 2
    """The longest side, times the usual one."""
    tiles: int = 1
    """Tiles along the side of an image of the usual size, in which it is decoded."""


@dataclass(frozen=True, slots=True)
class PartSizes:
    """What the profile of a part depends on beside its inputs."""

    image: ImageFacts
    factor: int = 1
    """Pixels along a side of an image, over those of the part's input."""
    tile: int = 0
    """Pixels along the side of a tile of the autoencoder."""
    stages: int = 1
    """Denoisers of the pipeline."""
    reach: Reach = Reach()


def decoder_profiles(rows: int, context: int) -> tuple[ProfileFacts, ...]:
    """A piece of one prompt, and one token for up to `rows` rows."""
    piece = min(PREFILL_CHUNK, context)
    prefill = {"batch": (1, 1, 1), "sequence": (1, piece, piece), "logits": (1, 1, piece)}
    decode = {"batch": (1, 1, rows), "sequence": (1, 1, 1), "logits": (1, 1, rows)}
    return ProfileFacts(name="prefill", axes=prefill), ProfileFacts(name="decode", axes=decode)


def part_profiles(call: Call, sizes: PartSizes) -> tuple[ProfileFacts, ...]:
    """Half to double the usual size of an image, or what a device has room for. An autoencoder is shown less at the
    edge of tiles, and no more than what is made without tiles."""
    inputs = [item.name for item in call.inputs]
    ranges = {"batch": _rows(inputs, sizes), "sequence": WORDS}
    ranges["steps"] = (1, 1, ranges["batch"][2])
    image, reach = sizes.image, sizes.reach
    tiled = is_autoencoder(inputs)
    for axis, pixels in (("height", image.height), ("width", image.width)):
        usual = max(1, pixels // sizes.factor)
        # `fmedge verify` makes the golden image again, which is small.
        least, most = max(1, min(usual // 2, GOLDEN_SIDE // sizes.factor)), usual * reach.larger
        if tiled and reach.tiles > 1:
            least, usual, most = 1, max(1, usual // reach.tiles), max(1, usual // reach.tiles)
        elif tiled:
            least, most = 1, max(usual, sizes.tile // sizes.factor, min(most, math.isqrt(TILED_FROM) // sizes.factor))
        ranges[axis] = least, usual, most
    height, width = ranges["height"], ranges["width"]
    # Transformers that get their patches in a row: two latents along each side make one.
    ranges["image_sequence"] = tuple(max(1, height[kind] * width[kind] // 4) for kind in range(3))  # type: ignore[assignment]  # three numbers
    axes = {dim for item in call.inputs for dim in item.dims if isinstance(dim, str)}
    axes |= {axis for item in call.inputs for axis in call.spread.get(item.name, ()) if isinstance(axis, str)}
    return (ProfileFacts(name="default", axes={axis: _fitting(axis, ranges, call) for axis in sorted(axes)}),)


def _rows(inputs: Sequence[str], sizes: PartSizes) -> Range:
    """What lies in a batch: prompts, images with their other halves, images to decode; everything else comes alone."""
    if "input_ids" in inputs:
        return (1, 2, PROMPTS)
    if is_denoiser(inputs):
        rows = rows_of_image(inputs, sizes.image, sizes.stages)
        return (1, rows, rows * sizes.reach.images)
    if "latent_sample" in inputs:
        pixels = sizes.image.height * sizes.image.width * sizes.reach.larger**2
        return (1, 1, decoded_together(sizes.reach.images, min(pixels, TILED_FROM)))
    return (1, 1, 1)


def decoded_together(images: int, pixels: int) -> int:
    """Images of so many pixels that go through an autoencoder in one call."""
    return max(1, min(images, TOGETHER // pixels))


def _fitting(axis: str, ranges: Mapping[str, Range], call: Call) -> Range:
    """The range of an axis in multiples of what the part wants, no longer than it allows."""
    if axis == RESIDUALS:
        return (1, *ranges["batch"][1:])
    whole, _, part = axis.partition("/")
    if part:  # 1 where there is nothing
        usual, most = (-(-size // int(part)) for size in _fitting(whole, ranges, call)[1:])
        return (1, usual, most)
    multiple, limit = call.multiples.get(axis, 1), call.limits.get(axis)
    sizes = ranges[axis]
    if axis == "batch" and "sequence" not in call.limits and any(item.name == "input_ids" for item in call.inputs):
        sizes = (1, 1, PADDED)
    least, usual, largest = (max(multiple, -(-min(size, limit or size) // multiple) * multiple) for size in sizes)
    return least, usual, largest
