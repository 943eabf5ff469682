"""DeepFloyd IF, in Imagen's design: Saharia et al. 2022, arXiv 2205.11487. A cascade of UNets in pixel space.

T5's states condition a UNet that makes a small image, and predicts the variance of its steps. Where the bundle has a
second UNet (`unet_2` with `scheduler_2` and `image_noising_scheduler`), that makes it larger: it is shown the enlarged
image with some noise, and told how much. Steps, guidance and scheduler of a request are the first one's.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import partial

import numpy as np

from fmedge_runtimes.parts import Parts
from fmedge_runtimes.pipelines.autoencoder import to_pixels
from fmedge_runtimes.pipelines.condition import Condition
from fmedge_runtimes.pipelines.enlarge import bilinear
from fmedge_runtimes.pipelines.latent_unet import UNET
from fmedge_runtimes.pipelines.masked_text import plain
from fmedge_runtimes.pipelines.padded_text import PaddedText
from fmedge_runtimes.pipelines.pipeline import GUIDED, Array, Order, Pixels, Progress, Render, Rendered, Sizes
from fmedge_runtimes.pipelines.stage import Beginning, Sampled, Stage, sample
from fmedge_runtimes.pipelines.trajectory import stacked
from fmedge_runtimes.pipelines.variance import learns_variance
from fmedge_runtimes.schedulers import table_of
from fmedge_runtimes.schedulers.diffusion_table import diffused
from fmedge_runtimes.schedulers.scheduler import Scheduler

LENGTH = 77
"""Tokens that the model reads."""
SECOND = "unet_2"
SECOND_STEPS, SECOND_GUIDANCE, NOISE_LEVEL = 50, 4.0, 250
"""Of the second UNet, which no option changes; the level is a timestep of the noise on what it is shown."""


def open_deepfloyd(parts: Parts) -> DeepFloyd:
    """The pipeline on the parts of a bundle. Raises BundleError when one is missing."""
    return DeepFloyd(parts)


class DeepFloyd:
    """T5 and one or two UNets."""

    takes = GUIDED

    def __init__(self, parts: Parts) -> None:
        """Raises BundleError when a part or one of its fields is missing."""
        parts.require("unet")
        self._parts = parts
        self._text = PaddedText(parts)
        unet = parts.config("unet")
        self._channels = unet.whole("in_channels")
        halvings = len(unet.numbers("block_out_channels")) - 1
        self._larger = 1
        if SECOND in parts:
            second = parts.config(SECOND)
            self._larger = second.whole("sample_size") // unet.whole("sample_size")
            halvings = max(halvings, len(second.numbers("block_out_channels")) - 1)
        self.sizes = Sizes(2**halvings * self._larger)

    def render(self, order: Order) -> Render:
        """Make the images; see `pipeline.Pipeline`."""
        states, negatives = self._states(order)
        yield Progress("encode", len(order.jobs), len(order.jobs))
        size = (order.height // self._larger, order.width // self._larger)
        stage = Stage(
            "unet",
            UNET,
            (self._channels, *size),
            order.open_scheduler,
            guidance=order.guidance,
            rescale=order.options.guidance_rescale,
            guided_channels=self._channels,
            learned_variance=learns_variance(order.open_scheduler.config()),
            preview=_pixels,
        )
        guided = order.guidance > 1
        conditions = [_condition(*both, guided=guided) for both in zip(states, negatives, strict=True)]
        found = yield from sample(self._parts, stage, conditions, order)
        steps = found.steps
        if SECOND in self._parts:
            conditions = [_condition(*both, guided=True) for both in zip(states, negatives, strict=True)]
            found = yield from self._second(order, found.samples, conditions)
            steps += found.steps
        return Rendered(_pixels(stacked(found.samples, range(len(order.jobs)))), found.samples, steps)

    def _states(self, order: Order) -> tuple[list[Array], list[Array]]:
        """T5's states [S, D] of each job's prompt, and of its negative one."""
        prompts = [self._text.tokens(plain(job.prompt), LENGTH, most=LENGTH) for job in order.jobs]
        prompts += [self._text.tokens(plain(job.negative or ""), LENGTH, most=LENGTH) for job in order.jobs]
        with self._parts.use(self._text.name) as part:
            states = self._text.encode(part, prompts)
        return states[: len(order.jobs)], states[len(order.jobs) :]

    def _second(
        self, order: Order, small: Sequence[Array], conditions: Sequence[Condition]
    ) -> Generator[Progress, None, Sampled]:
        """Larger images of small ones [C, h, w]."""
        noising = table_of(order.open_scheduler.config("image_noising_scheduler", chosen=False))
        signal = noising[NOISE_LEVEL]
        shape = (self._channels, order.height, order.width)

        def begin(scheduler: Scheduler, rows: Sequence[int]) -> Beginning:
            start = order.normal(rows, shape) * np.float32(scheduler.init_noise_sigma)
            larger = bilinear(stacked(small, rows), order.height, order.width)
            noise = order.normal(rows, shape)
            shown = diffused(larger, noise, np.sqrt(signal), np.sqrt(np.float32(1) - signal))
            return Beginning(start, channels=shown)

        told = {"class_labels": np.array(NOISE_LEVEL, np.float32)}  # []
        told_conditions = [one.and_also(told) for one in conditions]
        schedule = partial(order.open_scheduler, "scheduler_2", chosen=False, steps=SECOND_STEPS)
        stage = Stage(
            SECOND,
            UNET,
            shape,
            schedule,
            guidance=SECOND_GUIDANCE,
            guided_channels=self._channels,
            learned_variance=learns_variance(order.open_scheduler.config("scheduler_2", chosen=False)),
            begin=begin,
            preview=_pixels,
        )
        return (yield from sample(self._parts, stage, told_conditions, order))


def _condition(positive: Array, negative: Array, *, guided: bool) -> Condition:
    name = "encoder_hidden_states"
    return Condition({name: positive}, {name: negative} if guided else None)


def _pixels(image: Array) -> list[Pixels]:
    return list(to_pixels(image))
