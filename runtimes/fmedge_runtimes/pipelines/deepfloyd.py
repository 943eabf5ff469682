"""DeepFloyd IF, in Imagen's design: Saharia et al. 2022, arXiv 2205.11487. A cascade of UNets in pixel space.

T5's states condition a UNet that makes a small image, and predicts the variance of its steps. Where the bundle has a
second UNet (`unet_2` with `scheduler_2` and `image_noising_scheduler`), that makes it larger: it is shown the enlarged
image with some noise, and told how much. A third stage (`unet_3` and what is listed in THIRD) is the latent upscaler.
Steps, guidance and scheduler of a request are the first one's. The second is also a pipeline of its own, which enlarges
the image of a request.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from fmedge_runtimes.errors import RequestError
from fmedge_runtimes.parts import Parts
from fmedge_runtimes.pipelines.autoencoder import to_pixels
from fmedge_runtimes.pipelines.condition import Condition
from fmedge_runtimes.pipelines.enlarge import bilinear
from fmedge_runtimes.pipelines.latent_unet import UNET
from fmedge_runtimes.pipelines.latent_upscaler import Upscaler, UpscalerParts, UpscalerSettings
from fmedge_runtimes.pipelines.masked_text import plain
from fmedge_runtimes.pipelines.padded_text import PaddedText
from fmedge_runtimes.pipelines.pipeline import (
    AUTOENCODER,
    GUIDED,
    Array,
    Order,
    Pixels,
    Progress,
    Render,
    Rendered,
    Sizes,
)
from fmedge_runtimes.pipelines.stage import Beginning, Sampled, Stage, sample
from fmedge_runtimes.pipelines.trajectory import stacked
from fmedge_runtimes.pipelines.variance import learns_variance
from fmedge_runtimes.schedulers import table_of
from fmedge_runtimes.schedulers.diffusion_table import diffused
from fmedge_runtimes.schedulers.scheduler import Scheduler

LENGTH = 77
"""Tokens that the model reads."""
SECOND = "unet_2"
THIRD = UpscalerParts("text_encoder_3", "tokenizer_3", "unet_3", "scheduler_3")
ENLARGES = 4
"""Times that the second UNet, alone, makes an image larger."""
SECOND_STEPS, SECOND_GUIDANCE, NOISE_LEVEL = 50, 4.0, 250
"""Of the second UNet, which no option changes; the level is a timestep of the noise on what it is shown."""
THIRD_STEPS, THIRD_GUIDANCE, THIRD_NOISE_LEVEL = 75, 9.0, 100
"""Of the third stage: the upscaler's own, and the noise level at which the authors of IF use it."""


def open_deepfloyd(parts: Parts) -> DeepFloyd:
    """The pipeline on the parts of a bundle. Raises BundleError when one is missing."""
    return DeepFloyd(parts)


def open_deepfloyd_larger(parts: Parts) -> DeepFloydLarger:
    """The second UNet alone, which enlarges images that requests give."""
    return DeepFloydLarger(parts)


@dataclass(frozen=True, slots=True)
class _Larger:
    """How images are enlarged: the second UNet, its scheduler, and what a request says of them."""

    part: str
    scheduler: str
    chosen: bool
    steps: int
    guidance: float
    size: tuple[int, int]
    """Height and width of what is made."""
    noise_level: int = NOISE_LEVEL
    rescale: float = 0.0


class DeepFloyd:
    """T5 and one or two UNets, and perhaps an upscaler."""

    def __init__(self, parts: Parts) -> None:
        """Raises BundleError when a part or one of its fields is missing."""
        parts.require("unet")
        self._parts = parts
        self._text = PaddedText(parts)
        unet = parts.config("unet")
        self._channels = unet.whole("in_channels")
        multiple, self._times = _halved(parts, "unet"), 1
        if SECOND in parts:
            self._times = parts.config(SECOND).whole("sample_size") // unet.whole("sample_size")
            multiple = max(multiple * self._times, _halved(parts, SECOND))
        self._upscaler: Upscaler | None = None
        self.takes = GUIDED
        if THIRD.unet in parts:
            parts.require(SECOND)
            self._upscaler = Upscaler(parts, THIRD)
            self.takes |= AUTOENCODER | {"noise_level"}
            multiple = max(multiple, self._upscaler.times) * self._upscaler.times
        self.sizes = Sizes(multiple)

    def render(self, order: Order) -> Render:
        """Make the images; see `pipeline.Pipeline`."""
        level = order.options.noise_level
        third = UpscalerSettings(
            THIRD_STEPS, THIRD_GUIDANCE, THIRD_NOISE_LEVEL if level is None else level, chosen=False
        )
        if self._upscaler is not None:
            self._upscaler.check(order, third)
        states, negatives = _states(self._parts, self._text, order)
        yield Progress("encode", len(order.jobs), len(order.jobs))
        times = 1 if self._upscaler is None else self._upscaler.times
        height, width = order.height // times, order.width // times  # before the third stage
        stage = Stage(
            "unet",
            UNET,
            (self._channels, height // self._times, width // self._times),
            order.open_scheduler,
            guidance=order.guidance,
            rescale=order.options.guidance_rescale,
            guided_channels=self._channels,
            learned_variance=learns_variance(order.open_scheduler.config()),
            preview=_pixels,
        )
        found = yield from sample(self._parts, stage, _conditions(states, negatives, order.guidance), order)
        steps = found.steps
        if SECOND in self._parts:
            larger = _Larger(SECOND, "scheduler_2", False, SECOND_STEPS, SECOND_GUIDANCE, (height, width))
            conditions = _conditions(states, negatives, SECOND_GUIDANCE)
            found = yield from _enlarged(self._parts, order, larger, found.samples, conditions)
            steps += found.steps
        if self._upscaler is not None:
            found = yield from self._upscaler.enlarge(order, found.samples, third)
            pixels = yield from self._upscaler.autoencoder.decode(found.samples, order)
            return Rendered(pixels, found.samples, steps + found.steps)
        return Rendered(_pixels(stacked(found.samples, range(len(order.jobs)))), found.samples, steps)


class DeepFloydLarger:
    """T5 and the second UNet; a request has the small image."""

    takes = GUIDED | {"image", "noise_level"}

    def __init__(self, parts: Parts) -> None:
        """Raises BundleError when a part or one of its fields is missing."""
        parts.require("unet")
        self._parts = parts
        self._text = PaddedText(parts)
        self.sizes = Sizes(math.lcm(_halved(parts, "unet"), ENLARGES), enlarges=ENLARGES)

    def render(self, order: Order) -> Render:
        """Make the images; see `pipeline.Pipeline`."""
        if order.image is None:
            raise RequestError(f"{self._parts.folder} makes images larger; give the small one as Diffusion.image.")
        states, negatives = _states(self._parts, self._text, order)
        yield Progress("encode", len(order.jobs), len(order.jobs))
        level, size = order.options.noise_level, (order.height, order.width)
        larger = _Larger(
            "unet",
            "scheduler",
            True,
            order.steps,
            order.guidance,
            size,
            NOISE_LEVEL if level is None else level,
            order.options.guidance_rescale,
        )
        conditions = _conditions(states, negatives, order.guidance)
        found = yield from _enlarged(self._parts, order, larger, [order.image] * len(order.jobs), conditions)
        return Rendered(_pixels(stacked(found.samples, range(len(order.jobs)))), found.samples, found.steps)


def _halved(parts: Parts, unet: str) -> int:
    """What a UNet's sides must be multiples of."""
    return int(2 ** (len(parts.config(unet).numbers("block_out_channels")) - 1))


def _states(parts: Parts, text: PaddedText, order: Order) -> tuple[list[Array], list[Array]]:
    """T5's states [S, D] of each job's prompt, and of its negative one."""
    prompts = [text.tokens(plain(job.prompt), LENGTH, most=LENGTH) for job in order.jobs]
    prompts += [text.tokens(plain(job.negative or ""), LENGTH, most=LENGTH) for job in order.jobs]
    with parts.use(text.name) as part:
        states = text.encode(part, prompts)
    return states[: len(order.jobs)], states[len(order.jobs) :]


def _conditions(states: Sequence[Array], negatives: Sequence[Array], guidance: float) -> list[Condition]:
    name = "encoder_hidden_states"
    return [
        Condition({name: positive}, {name: negative} if guidance > 1 else None)
        for positive, negative in zip(states, negatives, strict=True)
    ]


def _enlarged(
    parts: Parts, order: Order, larger: _Larger, small: Sequence[Array], conditions: Sequence[Condition]
) -> Generator[Progress, None, Sampled]:
    """Larger images from small ones [C, h, w] in -1 to 1. Raises RequestError for a level that the table has not."""
    table = table_of(order.open_scheduler.config("image_noising_scheduler", chosen=False))
    if larger.noise_level >= len(table):
        raise RequestError(
            f"Diffusion.noise_level is {larger.noise_level}; {parts.folder} knows 0 to {len(table) - 1}."
        )
    signal = table[larger.noise_level]
    shape = (len(small[0]), *larger.size)

    def begin(scheduler: Scheduler, rows: Sequence[int]) -> Beginning:
        start = order.normal(rows, shape) * np.float32(scheduler.init_noise_sigma)
        enlarged = bilinear(stacked(small, rows), *larger.size)
        noise = order.normal(rows, shape)
        shown = diffused(enlarged, noise, np.sqrt(signal), np.sqrt(np.float32(1) - signal))
        return Beginning(start, channels=shown)

    told = {"class_labels": np.array(larger.noise_level, np.float32)}  # []
    config = order.open_scheduler.config(larger.scheduler, chosen=larger.chosen)
    stage = Stage(
        larger.part,
        UNET,
        shape,
        partial(order.open_scheduler, larger.scheduler, chosen=larger.chosen, steps=larger.steps, strength=1.0),
        guidance=larger.guidance,
        rescale=larger.rescale,
        guided_channels=shape[0],
        learned_variance=learns_variance(config),
        begin=begin,
        preview=_pixels,
    )
    return (yield from sample(parts, stage, [one.and_also(told) for one in conditions], order))


def _pixels(image: Array) -> list[Pixels]:
    return list(to_pixels(image))
