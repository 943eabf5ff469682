"""Kandinsky 2.2: Razzhigaev et al. 2023, arXiv 2310.03502. Two stages in one bundle, as diffusers' combined pipeline.

A prior makes CLIP's embedding of an image from the prompt; a UNet that is given that embedding, and no text, denoises
the latents of a quantized autoencoder. Steps, guidance and scheduler of a request are the UNet's.
"""

from __future__ import annotations

from collections.abc import Generator
from functools import partial

import numpy as np

from fmedge_runtimes.parts import Parts
from fmedge_runtimes.pipelines.autoencoder import Autoencoder
from fmedge_runtimes.pipelines.condition import Condition
from fmedge_runtimes.pipelines.image_prior import ImagePrior
from fmedge_runtimes.pipelines.latent_unet import UNET
from fmedge_runtimes.pipelines.pipeline import (
    AUTOENCODER,
    GUIDED,
    Array,
    Order,
    Progress,
    Render,
    Rendered,
    Sizes,
)
from fmedge_runtimes.pipelines.stage import Stage, sample
from fmedge_runtimes.pipelines.variance import learns_variance

PRIOR_STEPS, PRIOR_GUIDANCE = 25, 4.0
"""Of the prior, which no option changes."""


def open_kandinsky(parts: Parts) -> Kandinsky:
    """The pipeline on the parts of a bundle. Raises BundleError when one is missing."""
    return Kandinsky(parts)


class Kandinsky:
    """CLIP's two encoders, a prior, a UNet and an autoencoder."""

    takes = GUIDED | AUTOENCODER

    def __init__(self, parts: Parts) -> None:
        """Raises BundleError when a part or one of its fields is missing."""
        parts.require("unet", "movq_decoder", "prior_image_encoder")
        self._parts = parts
        self._prior = ImagePrior(parts, "prior_prior", "prior_text_encoder", "prior_tokenizer")
        self._autoencoder = Autoencoder(parts, "movq_decoder", "movq_encoder", scale=1.0)
        self._side = parts.config("prior_image_encoder").whole("image_size")
        # The UNet halves latents as often as the autoencoder halves pixels.
        self.sizes = Sizes(self._autoencoder.factor**2)

    def render(self, order: Order) -> Render:
        """Make the images; see `pipeline.Pipeline`."""
        conditions, before = yield from self._conditions(order)
        factor = self._autoencoder.factor
        shape = (self._autoencoder.channels, order.height // factor, order.width // factor)
        stage = Stage(
            "unet",
            UNET,
            shape,
            order.open_scheduler,
            guidance=order.guidance,
            rescale=order.options.guidance_rescale,
            guided_channels=shape[0],
            learned_variance=learns_variance(order.open_scheduler.config()),
            preview=self._autoencoder.preview,
        )
        found = yield from sample(self._parts, stage, conditions, order)
        pixels = yield from self._autoencoder.decode(found.samples, order)
        return Rendered(pixels, found.samples, before + found.steps)

    def _conditions(self, order: Order) -> Generator[Progress, None, tuple[list[Condition], int]]:
        """Embeddings of the images of each job, and the steps that they took.

        A negative prompt is imagined, too; without one guidance leads away from the embedding of a black image.
        """
        count = len(order.jobs)
        texts = self._prior.texts([job.prompt for job in order.jobs] + [job.negative or "" for job in order.jobs])
        away = texts[count:]
        wanted = [
            [text] if job.negative is None else [text, other]
            for job, text, other in zip(order.jobs, texts, away, strict=False)
        ]
        nothing = self._nothing() if order.guidance > 1 and any(len(each) == 1 for each in wanted) else None
        yield Progress("encode", count, count)
        schedule = partial(order.open_scheduler, "prior_scheduler", chosen=False, steps=PRIOR_STEPS, strength=1.0)
        embeddings, steps = yield from self._prior.embed(order, wanted, away, schedule, PRIOR_GUIDANCE)
        conditions = []
        for made in embeddings:
            negative = made[1] if len(made) > 1 else nothing
            other = None if order.guidance <= 1 or negative is None else {"image_embeds": negative}
            conditions.append(Condition({"image_embeds": made[0]}, other))
        return conditions, steps

    def _nothing(self) -> Array:
        """CLIP's embedding [D] of an image of zeros."""
        with self._parts.use("prior_image_encoder") as part:
            pixels = np.zeros((1, 3, self._side, self._side), np.float32)
            found: Array = part.output("image_embeds", part.run({"pixel_values": pixels}))[0]
        return found.astype(np.float32, copy=False)
