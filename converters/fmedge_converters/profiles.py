"""The optimization profiles that a bundle for TensorRT asks its engines to be built with; docs/tensorrt.md."""

from __future__ import annotations

from collections.abc import Mapping

from fmedge_runtimes.decoder import PREFILL_CHUNK
from fmedge_runtimes.manifest import ImageFacts, ProfileFacts

from fmedge_converters.parts.part import Call

IMAGES = (1, 2, 8)
"""Rows of a batch of images: guidance doubles them."""
SIDES = (2, 1, 2)
"""Smallest side, over this; usual; largest, times this."""
WORDS = (1, 77, 512)
"""Tokens of an image's prompt."""


def decoder_profiles(rows: int, context: int) -> tuple[ProfileFacts, ...]:
    """A piece of one prompt, and one token for up to `rows` rows."""
    piece = min(PREFILL_CHUNK, context)
    prefill = {"batch": (1, 1, 1), "sequence": (1, piece, piece), "logits": (1, 1, piece)}
    decode = {"batch": (1, 1, rows), "sequence": (1, 1, 1), "logits": (1, 1, rows)}
    return ProfileFacts(name="prefill", axes=prefill), ProfileFacts(name="decode", axes=decode)


def part_profiles(call: Call, image: ImageFacts, factor: int) -> tuple[ProfileFacts, ...]:
    """Half to double the usual size of an image. `factor`: pixels along a side of what the part takes, over those of
    its input."""
    sizes: dict[str, tuple[int, int, int]] = {"batch": IMAGES, "steps": (1, 1, IMAGES[2]), "sequence": WORDS}
    for axis, pixels in (("height", image.height), ("width", image.width)):
        usual = max(1, pixels // factor)
        sizes[axis] = (max(1, usual // SIDES[0]), usual, usual * SIDES[2])
    height, width = sizes["height"], sizes["width"]
    # Transformers that get their patches in a row: two latents along each side make one.
    sizes["image_sequence"] = tuple(max(1, height[kind] * width[kind] // 4) for kind in range(3))  # type: ignore[assignment]  # three numbers
    axes = {dim for item in call.inputs for dim in item.dims if isinstance(dim, str)}
    axes |= {axis for item in call.inputs for axis in call.spread.get(item.name, ()) if isinstance(axis, str)}
    return (ProfileFacts(name="default", axes={axis: _fitting(axis, sizes, call) for axis in sorted(axes)}),)


def _fitting(axis: str, sizes: Mapping[str, tuple[int, int, int]], call: Call) -> tuple[int, int, int]:
    """The sizes of an axis as multiples of what the part wants, no longer than it allows."""
    multiple, limit = call.multiples.get(axis, 1), call.limits.get(axis)
    least, usual, largest = (max(multiple, -(-min(size, limit or size) // multiple) * multiple) for size in sizes[axis])
    return least, usual, largest
