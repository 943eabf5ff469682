"""PixArt alpha and sigma: Chen et al. 2023 and 2024, arXiv 2310.00426 and 2403.04692.

T5's states, with a mask that hides their padding, condition a transformer, which in the large alpha models is told the
size of the image, too. It also predicts a variance, which is not used.
"""

from __future__ import annotations

import numpy as np

from fmedge_runtimes.parts import Parts
from fmedge_runtimes.pipelines.autoencoder import Autoencoder
from fmedge_runtimes.pipelines.masked_text import masked_conditions, plain
from fmedge_runtimes.pipelines.padded_text import PaddedText, length_of
from fmedge_runtimes.pipelines.pipeline import (
    AUTOENCODER,
    GUIDED,
    PADDED,
    Order,
    Progress,
    Render,
    Rendered,
    Sizes,
)
from fmedge_runtimes.pipelines.stage import TRANSFORMER, Stage, sample

ALPHA, SIGMA = 120, 300
"""Tokens that the two read, unless the request says otherwise."""


def open_pixart_alpha(parts: Parts) -> PixArt:
    """The pipeline on the parts of a bundle. Raises BundleError when one is missing."""
    return PixArt(parts, ALPHA)


def open_pixart_sigma(parts: Parts) -> PixArt:
    """The same of sigma."""
    return PixArt(parts, SIGMA)


class PixArt:
    """T5, a transformer and an autoencoder."""

    takes = GUIDED | AUTOENCODER | PADDED

    def __init__(self, parts: Parts, length: int) -> None:
        """Raises BundleError when a part or one of its fields is missing."""
        parts.require("transformer", "vae_decoder")
        self._parts = parts
        self._length = length
        self._text = PaddedText(parts)
        self._autoencoder = Autoencoder(parts)
        transformer = parts.config("transformer")
        self._sized = transformer.flag("use_additional_conditions")
        self.sizes = Sizes(self._autoencoder.factor * transformer.whole("patch_size"))

    def render(self, order: Order) -> Render:
        """Make the images; see `pipeline.Pipeline`."""
        length = length_of(order.options.max_sequence_length, self._length, None)
        prompts = [self._text.tokens(plain(job.prompt), length) for job in order.jobs]
        guided = order.guidance > 1
        negatives = [self._text.tokens(plain(job.negative or ""), length) for job in order.jobs if guided]
        conditions = masked_conditions(self._parts, self._text, prompts, negatives)
        if self._sized:
            size = (order.height, order.width)
            told = {
                "resolution": np.array(size, np.float32),
                "aspect_ratio": np.array([order.height / order.width], np.float32),
            }
            conditions = [condition.and_also(told) for condition in conditions]
        yield Progress("encode", len(order.jobs), len(order.jobs))
        factor = self._autoencoder.factor
        shape = (self._autoencoder.channels, order.height // factor, order.width // factor)
        stage = Stage(
            "transformer",
            TRANSFORMER,
            shape,
            order.open_scheduler,
            guidance=order.guidance,
            rescale=order.options.guidance_rescale,
            guided_channels=shape[0],
            preview=self._autoencoder.preview,
        )
        found = yield from sample(self._parts, stage, conditions, order)
        pixels = yield from self._autoencoder.decode(found.samples, order)
        return Rendered(pixels, found.samples, found.steps)
