"""Stable Diffusion's upscaler: Rombach et al. 2022, arXiv 2112.10752, section 4.5. Also DeepFloyd IF's third stage.

A UNet whose latents are as large as the small image: it is shown that image with some noise, and told how much. The
autoencoder's decoder is what makes it larger.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from fmedge_runtimes.errors import RequestError
from fmedge_runtimes.parts import Parts
from fmedge_runtimes.pipelines.autoencoder import Autoencoder
from fmedge_runtimes.pipelines.latent_unet import UNET
from fmedge_runtimes.pipelines.pipeline import (
    AUTOENCODER,
    CLIP,
    GUIDED,
    Array,
    Order,
    Progress,
    Render,
    Rendered,
    Sizes,
)
from fmedge_runtimes.pipelines.stable_diffusion import ClipStates
from fmedge_runtimes.pipelines.stage import Beginning, Sampled, Stage, sample
from fmedge_runtimes.pipelines.trajectory import stacked
from fmedge_runtimes.schedulers import table_of
from fmedge_runtimes.schedulers.diffusion_table import diffused
from fmedge_runtimes.schedulers.scheduler import Scheduler

NOISE_LEVEL, MOST_NOISE = 20, 350
"""If nobody says otherwise, and the highest where model_index.json says none."""
SCALE = 0.08333
"""Between the autoencoder's units and the UNet's: diffusers takes it whatever the config says."""


def open_latent_upscaler(parts: Parts) -> LatentUpscaler:
    """The pipeline on the parts of a bundle. Raises BundleError when one is missing."""
    return LatentUpscaler(parts)


@dataclass(frozen=True, slots=True)
class UpscalerParts:
    """Names of the folders, which are others in a cascade."""

    text_encoder: str = "text_encoder"
    tokenizer: str = "tokenizer"
    unet: str = "unet"
    scheduler: str = "scheduler"
    low_res_scheduler: str = "low_res_scheduler"


ALONE = UpscalerParts()


@dataclass(frozen=True, slots=True)
class UpscalerSettings:
    """What a request says of them."""

    steps: int
    guidance: float
    noise_level: int
    rescale: float = 0.0
    chosen: bool = True
    """Whether the request's scheduler is this stage's."""


class Upscaler:
    """Small images to latents of larger ones; the constructor raises BundleError for a part that is missing."""

    def __init__(self, parts: Parts, names: UpscalerParts) -> None:
        parts.require(names.unet, "vae_decoder")
        self._parts, self._names = parts, names
        self._texts = ClipStates(parts, names.text_encoder, names.tokenizer)
        self.autoencoder = Autoencoder(parts, scale=SCALE)
        self.times = self.autoencoder.factor
        """How many times larger an image becomes."""
        self._most_noise = parts.index.whole("max_noise_level", MOST_NOISE)

    def check(self, order: Order, settings: UpscalerSettings) -> None:
        """Raise RequestError for what cannot be served."""
        self._texts.check(order)
        self.autoencoder.check(order, encodes=False)
        if settings.noise_level > self._most_noise:
            raise RequestError(
                f"Diffusion.noise_level is {settings.noise_level}; {self._parts.folder} knows 0 to {self._most_noise}."
            )

    def enlarge(
        self, order: Order, small: Sequence[Array], settings: UpscalerSettings
    ) -> Generator[Progress, None, Sampled]:
        """The latents [C, h, w] of each job's image, of small ones [3, h, w] in -1 to 1."""
        conditions = self._texts.encode(order, guided=settings.guidance > 1)
        yield Progress("encode", len(order.jobs), len(order.jobs))
        told = {"class_labels": np.array(settings.noise_level, np.float32)}  # [], an integer for the graph
        table = table_of(order.open_scheduler.config(self._names.low_res_scheduler, chosen=False))
        signal = table[settings.noise_level]
        shape = (self.autoencoder.channels, *small[0].shape[1:])

        def begin(scheduler: Scheduler, rows: Sequence[int]) -> Beginning:
            noise = order.normal(rows, small[0].shape)
            shown = diffused(stacked(small, rows), noise, np.sqrt(signal), np.sqrt(np.float32(1) - signal))
            return Beginning(order.normal(rows, shape) * np.float32(scheduler.init_noise_sigma), channels=shown)

        stage = Stage(
            self._names.unet,
            UNET,
            shape,
            partial(
                order.open_scheduler,
                self._names.scheduler,
                chosen=settings.chosen,
                steps=settings.steps,
                strength=1.0,
            ),
            guidance=settings.guidance,
            rescale=settings.rescale,
            begin=begin,
            preview=self.autoencoder.preview,
        )
        return (yield from sample(self._parts, stage, [one.and_also(told) for one in conditions], order))


class LatentUpscaler:
    """A pipeline that makes the image of a request larger."""

    takes = GUIDED | AUTOENCODER | CLIP | {"image", "noise_level"}

    def __init__(self, parts: Parts) -> None:
        """Raises BundleError when a part or one of its fields is missing."""
        self._parts = parts
        self._upscaler = Upscaler(parts, ALONE)
        times = self._upscaler.times
        # The small image is cut to multiples of the same factor, as in diffusers.
        self.sizes = Sizes(times * times, enlarges=times)

    def render(self, order: Order) -> Render:
        """Make the images; see `pipeline.Pipeline`."""
        if order.image is None:
            raise RequestError(f"{self._parts.folder} makes images larger; give the small one as Diffusion.image.")
        level = order.options.noise_level
        settings = UpscalerSettings(
            order.steps, order.guidance, NOISE_LEVEL if level is None else level, order.options.guidance_rescale
        )
        self._upscaler.check(order, settings)
        order.open_scheduler()  # refuses a name or steps that cannot be
        found = yield from self._upscaler.enlarge(order, [order.image] * len(order.jobs), settings)
        pixels = yield from self._upscaler.autoencoder.decode(found.samples, order)
        return Rendered(pixels, found.samples, found.steps)
