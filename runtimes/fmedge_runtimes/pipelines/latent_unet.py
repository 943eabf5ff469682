"""What Stable Diffusion's pipelines have in common: a UNet in the latent space of an autoencoder.

Text to image, image to image, and inpainting with either kind of UNet: one with the latents' channels, whose kept part
is put back behind every step, and one with nine, which is shown mask and masked image. Which draws of a job's generator
go into what, and in which order, is as in diffusers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Protocol

import numpy as np

from fmedge_runtimes.errors import RequestError
from fmedge_runtimes.parts import Parts
from fmedge_runtimes.pipelines.autoencoder import Autoencoder, Posterior
from fmedge_runtimes.pipelines.condition import Condition
from fmedge_runtimes.pipelines.control import guides_of
from fmedge_runtimes.pipelines.denoiser import Form
from fmedge_runtimes.pipelines.latent_start import LatentStart
from fmedge_runtimes.pipelines.pipeline import (
    AUTOENCODER,
    CLIP,
    CONTROLLED,
    FROM_IMAGE,
    GUIDED,
    REFERRED,
    Array,
    Order,
    Progress,
    Render,
    Rendered,
    Sizes,
)
from fmedge_runtimes.pipelines.reference import Reference, has_reference
from fmedge_runtimes.pipelines.stage import Beginning, Stage, sample
from fmedge_runtimes.schedulers.scheduler import Scheduler

UNET = Form(sample="sample", output="out_sample")


class Texts(Protocol):
    """How a family encodes prompts."""

    def check(self, order: Order) -> None:
        """Raise RequestError for what cannot be encoded."""
        ...

    def encode(self, order: Order, *, guided: bool) -> list[Condition]:
        """The conditions of each job; equal prompts are encoded once."""
        ...


class LatentUnet:
    """A pipeline of text encoders, a UNet and an autoencoder."""

    takes = GUIDED | FROM_IMAGE | AUTOENCODER | CLIP | CONTROLLED | REFERRED | {"mask"}

    def __init__(self, parts: Parts, texts: Texts) -> None:
        """Raises BundleError when a part or one of its fields is missing."""
        parts.require("unet", "vae_decoder")
        self._parts, self._texts = parts, texts
        self._autoencoder = Autoencoder(parts)
        self._reference = Reference(parts) if has_reference(parts) else None
        unet = parts.config("unet")
        self._channels = unet.whole("in_channels")
        self._guidance_width = unet.whole("time_cond_proj_dim", 0)
        self._latents = self._autoencoder.channels
        self.sizes = Sizes(self._autoencoder.factor)

    @property
    def _sees_mask(self) -> bool:
        return self._channels == 2 * self._latents + 1

    def render(self, order: Order) -> Render:
        """Make the images; see `pipeline.Pipeline`."""
        self._check(order)
        guided = order.guidance > 1 and not self._guidance_width
        conditions = self._texts.encode(order, guided=guided)
        if self._reference is not None:
            conditions = self._reference.added(conditions, order)
        yield Progress("encode", len(order.jobs), len(order.jobs))
        posteriors = self._posteriors(order)
        if posteriors:
            yield Progress("encode", len(order.jobs), len(order.jobs))
        guides = guides_of(self._parts, order)
        if order.controls:
            yield Progress("encode", len(order.jobs), len(order.jobs))
        factor = self._autoencoder.factor
        shape = (self._latents, order.height // factor, order.width // factor)
        stage = Stage(
            "unet",
            UNET,
            shape,
            order.open_scheduler,
            guidance=order.guidance,
            rescale=order.options.guidance_rescale,
            begin=partial(self._begin, LatentStart(order, shape, posteriors.get("image")), posteriors),
            guides=guides,
            preview=self._autoencoder.preview,
        )
        if self._guidance_width:
            told = guidance_embedding(np.array([order.guidance], np.float32), self._guidance_width)[0]
            conditions = [Condition({**one.positive, "timestep_cond": told}, one.negative) for one in conditions]
        found = yield from sample(self._parts, stage, conditions, order)
        pixels = yield from self._autoencoder.decode(found.samples, order)
        return Rendered(pixels, found.samples, found.steps)

    def _check(self, order: Order) -> None:
        self._texts.check(order)
        self._autoencoder.check(order)
        order.open_scheduler()  # refuses a name, steps or a strength that cannot be
        if self._sees_mask and order.mask is None:
            raise RequestError(
                f"{self._parts.folder} repaints parts of images: its UNet wants an image and a mask; give both."
            )
        if not self._sees_mask and self._channels != self._latents:
            raise RequestError(
                f"the UNet of {self._parts.folder} takes {self._channels} channels where latents have {self._latents}; "
                "no pipeline here feeds it."
            )

    def _posteriors(self, order: Order) -> Mapping[str, Posterior]:
        """Latents of the image, where it is begun with or kept, and of what the mask leaves of it."""
        if order.image is None:
            return {}
        found: dict[str, Posterior] = {}
        with self._parts.use(self._autoencoder.encoder) as part:
            if not self._sees_mask or order.strength < 1:
                found["image"] = self._autoencoder.encode(part, order.image, order.options.tiling)
            if order.mask is not None:
                masked = order.image * (order.mask < 0.5)
                # For a UNet that sees no mask diffusers draws a sample, too, and does not use it.
                found["masked"] = (
                    self._autoencoder.encode(part, masked, order.options.tiling) if self._sees_mask else found["image"]
                )
        return found

    def _begin(
        self, start: LatentStart, posteriors: Mapping[str, Posterior], scheduler: Scheduler, rows: Sequence[int]
    ) -> Beginning:
        """As from an image; a UNet that sees mask and masked image is shown them, and nothing is put back."""
        order, begun = start.order, start(scheduler, rows)
        if order.mask is None:
            return begun
        masked = posteriors["masked"].sample(order.normal, rows)
        if not self._sees_mask:
            return begun
        factor = self._autoencoder.factor
        mask = order.mask[None, :, ::factor, ::factor]  # [1, 1, h, w]
        seen = np.concatenate([np.broadcast_to(mask, (len(rows), *mask.shape[1:])), masked], axis=1)
        return Beginning(begun.start, channels=seen)


def guidance_embedding(guidance: Array, width: int) -> Array:
    """How a model that was distilled with guidance is told its scale [B]: sines and cosines [B, width].

    Salimans and Ho 2022 (arXiv 2202.00512); the formula is that of the transformer's positions.
    """
    half = width // 2
    rates = np.exp(np.arange(half, dtype=np.float32) * -(np.log(np.float32(10000)) / np.float32(half - 1)))
    angles = ((guidance - 1) * np.float32(1000))[:, None] * rates[None]  # [B, width / 2]
    found = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    return np.pad(found, ((0, 0), (0, width - 2 * half)))
