"""Images beside the prompt, by an IP-Adapter (Ye et al. 2023, arXiv 2308.06721): tokens that the UNet attends to.

reference = Reference.of(parts)
conditions = reference.added(conditions, order)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fmedge_runtimes.errors import BundleError
from fmedge_runtimes.parts import Config, Parts
from fmedge_runtimes.pipelines.condition import Condition
from fmedge_runtimes.pipelines.pipeline import Array, Order

if TYPE_CHECKING:
    from PIL.Image import Image

PART, FACTS = "image_encoder", "ip_adapter.json"
PROCESSOR = "feature_extractor/preprocessor_config.json"
TOKENS, NO_TOKENS = "ip_hidden_states", "negative_ip_hidden_states"
STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
BICUBIC = 3
"""Pillow's number of the filter."""
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""CLIP's, of levels from 0 to 1."""


def has_reference(parts: Parts) -> bool:
    """Whether a bundle has an IP-Adapter."""
    return PART in parts and (parts.folder / PART / FACTS).is_file()


class Reference:
    """The IP-Adapter of a bundle. The constructor reads its configs."""

    def __init__(self, parts: Parts) -> None:
        """Raises BundleDamagedError, and BundleError for a preparation of images that is not CLIP's."""
        self._parts = parts
        facts = parts.config(PART, FACTS)
        self._shape = (facts.whole("tokens"), facts.whole("width"))
        self._processor = parts.config("", PROCESSOR)
        other = next((name for name in STEPS if not self._processor.flag(name, True)), None)
        if other is not None or self._processor.whole("resample", BICUBIC) != BICUBIC:
            raise BundleError(
                f"{self._processor.path} prepares images in another way than CLIP does ({other or 'resample'}), "
                "which this version does not."
            )

    def added(self, conditions: Sequence[Condition], order: Order) -> list[Condition]:
        """The conditions of jobs with the tokens of their images, zeros where there is none. Raises BackendError."""
        if not order.references:
            return [one.and_also({TOKENS: np.zeros(self._shape, np.float32)}) for one in conditions]
        tokens, nothing = self._encoded(order.references)
        found = []
        for job, one in zip(order.jobs, conditions, strict=True):
            own = tokens[job.prompt_index if len(tokens) > 1 else 0]
            negative = None if one.negative is None else {**one.negative, TOKENS: nothing}
            found.append(Condition({**one.positive, TOKENS: own}, negative))
        return found

    def _encoded(self, images: Sequence[Image]) -> tuple[list[Array], Array]:
        """The tokens of each image, each different one encoded once, and those of none [T, D]."""
        found: dict[int, Array] = {}
        nothing: Array | None = None
        with self._parts.use(PART) as part:
            for image in images:
                if id(image) not in found:
                    pixels = clip_pixels(image, self._processor)
                    outputs = part.run({"pixel_values": pixels})
                    found[id(image)] = part.output(TOKENS, outputs)[0]
                    if nothing is None and NO_TOKENS in outputs:
                        nothing = part.output(NO_TOKENS, outputs)[0]
            if nothing is None:
                # What reads the states of an image is shown a grey one, as in diffusers.
                nothing = part.output(TOKENS, part.run({"pixel_values": np.zeros_like(pixels)}))[0]
        return [found[id(image)] for image in images], nothing


def clip_pixels(image: Image, processor: Config) -> Array:
    """An image as CLIP's encoder takes it [1, 3, S, S]: its shorter side resized, its middle cut out, normalized."""
    from PIL import Image as Pillow

    side = _pixels(processor, "crop_size", "height")
    shortest = _pixels(processor, "size", "shortest_edge")
    image = image.convert("RGB")
    scale = shortest / min(image.size)
    width, height = (shortest if length == min(image.size) else int(length * scale) for length in image.size)
    resized = image.resize((width, height), Pillow.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    levels = np.asarray(resized.crop((left, top, left + side, top + side)), np.float32) / np.float32(255)  # [S, S, 3]
    mean = np.array(processor.numbers("image_mean", MEAN), np.float32)
    deviation = np.array(processor.numbers("image_std", DEVIATION), np.float32)
    return np.ascontiguousarray(np.moveaxis((levels - mean) / deviation, -1, 0)[None])


def _pixels(processor: Config, name: str, key: str) -> int:
    """A size, which older files say as a number."""
    found = processor.values.get(name)
    value = found.get(key) if isinstance(found, dict) else found
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BundleError(
            f"{processor.path}: {name} is {found!r}, and must say {key} in pixels; export the bundle again."
        )
    return value
