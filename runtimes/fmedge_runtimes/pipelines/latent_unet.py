"""What Stable Diffusion's pipelines have in common: a UNet in the latent space of an autoencoder.

Text to image, image to image, and inpainting with either kind of UNet: one with the latents' channels, whose kept part
is put back behind every step, and one with nine, which is shown mask and masked image. Which draws of a job's generator
go into what, and in which order, is as in diffusers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fmedge_runtimes.errors import RequestError
from fmedge_runtimes.parts import Parts
from fmedge_runtimes.pipelines.autoencoder import Autoencoder, Posterior
from fmedge_runtimes.pipelines.condition import Condition, together
from fmedge_runtimes.pipelines.denoiser import Conditions, Denoiser, Form
from fmedge_runtimes.pipelines.pipeline import (
    AUTOENCODER,
    CLIP,
    FROM_IMAGE,
    GUIDED,
    Array,
    Order,
    Progress,
    Render,
    Rendered,
    Sizes,
)
from fmedge_runtimes.pipelines.trajectory import Amend, check_varied, denoise
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

    takes = GUIDED | FROM_IMAGE | AUTOENCODER | CLIP | {"mask"}

    def __init__(self, parts: Parts, texts: Texts) -> None:
        """Raises BundleError when a part or one of its fields is missing."""
        parts.require("unet", "vae_decoder")
        self._parts, self._texts = parts, texts
        self._autoencoder = Autoencoder(parts)
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
        yield Progress("encode", len(order.jobs), len(order.jobs))
        posteriors = self._posteriors(order)
        if posteriors:
            yield Progress("encode", len(order.jobs), len(order.jobs))
        latents: list[Array | None] = [None] * len(order.jobs)
        evaluations = 0
        with self._parts.use("unet") as part:
            for rows in order.batches([condition.alike for condition in conditions]):
                begin = self._begin(order, rows, posteriors)
                denoiser = Denoiser(
                    part,
                    UNET,
                    self._conditions(order, [conditions[row] for row in rows], begin.channels),
                    guidance=order.guidance,
                    rescale=order.options.guidance_rescale,
                    split=order.split_guidance,
                )
                sample = yield from denoise(
                    denoiser,
                    begin.scheduler,
                    begin.start,
                    order,
                    rows,
                    amend=begin.amend,
                    preview=self._autoencoder.preview,
                )
                check_varied("unet", sample)
                evaluations = len(begin.scheduler.timesteps)
                for row, one in zip(rows, sample, strict=True):
                    latents[row] = one
        done = [one for one in latents if one is not None]
        return Rendered((yield from self._autoencoder.decode(done, order)), done, evaluations)

    def _check(self, order: Order) -> None:
        self._texts.check(order)
        if self._sees_mask and order.mask is None:
            raise RequestError(
                f"{self._parts.folder} repaints parts of images: its UNet wants an image and a mask; give both."
            )
        if not self._sees_mask and self._channels != self._latents:
            raise RequestError(
                f"the UNet of {self._parts.folder} takes {self._channels} channels where latents have {self._latents}; "
                "no pipeline here feeds it."
            )
        if order.image is not None:
            self._parts.require(self._autoencoder.encoder)

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

    def _conditions(self, order: Order, conditions: Sequence[Condition], channels: Array | None) -> Conditions:
        positive = together([condition.positive for condition in conditions])
        negatives = [condition.negative for condition in conditions if condition.negative is not None]
        if self._guidance_width:
            scale = np.full(len(conditions), order.guidance, np.float32)
            positive = {**positive, "timestep_cond": guidance_embedding(scale, self._guidance_width)}
        return Conditions(positive, together(negatives) if negatives else None, channels=channels)

    def _begin(self, order: Order, rows: Sequence[int], posteriors: Mapping[str, Posterior]) -> _Beginning:
        factor = self._autoencoder.factor
        shape = (self._latents, order.height // factor, order.width // factor)
        scheduler = order.open_scheduler()
        image = posteriors.get("image")
        original = None if image is None else image.sample(order.normal, rows)
        noise = order.normal(rows, shape)  # [B, C, h, w]
        if original is None or (order.mask is not None and order.strength == 1):
            start = noise * np.float32(scheduler.init_noise_sigma)
        else:
            start = scheduler.add_noise(original, noise, 0)
        if order.mask is None:
            return _Beginning(scheduler, start)
        mask = order.mask[None, :, ::factor, ::factor]  # [1, 1, h, w]
        masked = posteriors["masked"].sample(order.normal, rows)
        if self._sees_mask:
            seen = np.concatenate([np.broadcast_to(mask, (len(rows), *mask.shape[1:])), masked], axis=1)
            return _Beginning(scheduler, start, channels=seen)
        assert original is not None  # what is kept was encoded
        return _Beginning(scheduler, start, amend=_keeping(scheduler, mask, original, noise))


@dataclass(frozen=True, slots=True)
class _Beginning:
    """Where the trajectory of a batch starts, and what it is held to."""

    scheduler: Scheduler
    start: Array
    """[B, C, h, w]"""
    channels: Array | None = None
    """Mask and masked image [B, 1 + C, h, w], for a UNet that sees them."""
    amend: Amend | None = None


def _keeping(scheduler: Scheduler, mask: Array, original: Array, noise: Array) -> Amend:
    """Puts the original, noised as much as the sample, back where the mask is dark."""

    def amend(sample: Array, index: int) -> Array:
        last = index + 1 == len(scheduler.timesteps)
        kept = original if last else scheduler.add_noise(original, noise, index + 1)
        return (1 - mask) * kept + mask * sample

    return amend


def guidance_embedding(guidance: Array, width: int) -> Array:
    """How a model that was distilled with guidance is told its scale [B]: sines and cosines [B, width].

    Salimans and Ho 2022 (arXiv 2202.00512); the formula is that of the transformer's positions.
    """
    half = width // 2
    rates = np.exp(np.arange(half, dtype=np.float32) * -(np.log(np.float32(10000)) / np.float32(half - 1)))
    angles = ((guidance - 1) * np.float32(1000))[:, None] * rates[None]  # [B, width / 2]
    found = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    return np.pad(found, ((0, 0), (0, width - 2 * half)))
