"""Flux.1 dev and schnell: Black Forest Labs 2024; a transformer of double and single streams over rectified flow.

Latents go in as packages of 2 x 2, one behind the other, each with its place; T5's states condition them, and CLIP's
pooled embedding of the prompt's beginning. dev was distilled with guidance, and is told its scale; schnell has none.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from fmedge_runtimes.parts import Parts
from fmedge_runtimes.pipelines.autoencoder import Autoencoder
from fmedge_runtimes.pipelines.clip_text import ClipText, Encoded
from fmedge_runtimes.pipelines.condition import Condition
from fmedge_runtimes.pipelines.denoiser import Form
from fmedge_runtimes.pipelines.latent_start import LatentStart, posterior_of
from fmedge_runtimes.pipelines.padded_text import PaddedText, length_of
from fmedge_runtimes.pipelines.pipeline import (
    AUTOENCODER,
    FROM_IMAGE,
    PADDED,
    Array,
    Order,
    Pixels,
    Progress,
    Render,
    Rendered,
    Sizes,
)
from fmedge_runtimes.pipelines.shift import shift_of
from fmedge_runtimes.pipelines.stage import Stage, sample
from fmedge_runtimes.schedulers import FlowMatchEulerSettings
from fmedge_runtimes.schedulers.scheduler import Scheduler

LENGTH = 512
"""Tokens that T5 reads, unless the request says otherwise; and at most."""
PACK = 2
"""Latents of a package's side."""
FORM = Form(
    sample="hidden_states",
    output="out_hidden_states",
    timestep_rows=True,
    timestep_of=lambda timestep: timestep / np.float32(1000),
)


def open_flux(parts: Parts) -> Flux:
    """The pipeline on the parts of a bundle. Raises BundleError when one is missing."""
    return Flux(parts)


class Flux:
    """Two text encoders, a transformer and an autoencoder."""

    def __init__(self, parts: Parts) -> None:
        """Raises BundleError when a part or one of its fields is missing."""
        parts.require("transformer", "vae_decoder")
        self._parts = parts
        self._clip = ClipText(parts)
        self._t5 = PaddedText(parts, "text_encoder_2", "tokenizer_2")
        self._autoencoder = Autoencoder(parts)
        self._told = parts.config("transformer").flag("guidance_embeds")
        self.sizes = Sizes(self._autoencoder.factor * PACK)
        self.takes = FROM_IMAGE | AUTOENCODER | PADDED | {"mask"} | ({"guidance"} if self._told else set())

    def render(self, order: Order) -> Render:
        """Make the images; see `pipeline.Pipeline`."""
        if order.image is not None:
            self._parts.require(self._autoencoder.encoder)
        length = length_of(order.options.max_sequence_length, LENGTH, LENGTH)
        conditions = self._conditions(order, length)
        yield Progress("encode", len(order.jobs), len(order.jobs))
        image = posterior_of(self._parts, self._autoencoder, order)
        factor = self._autoencoder.factor
        height, width = order.height // factor, order.width // factor
        shape = (self._autoencoder.channels, height, width)

        def preview(packed: Array) -> list[Pixels]:
            return self._autoencoder.preview(unpacked(packed, height, width))

        stage = Stage(
            "transformer",
            FORM,
            shape,
            partial(_schedule, order, height * width // PACK**2),
            shared={"img_ids": places(height, width), "txt_ids": np.zeros((length, 3), np.float32)},
            begin=LatentStart(order, shape, image, packed),
            preview=preview,
        )
        found = yield from sample(self._parts, stage, conditions, order)
        latents = [unpacked(one[None], height, width)[0] for one in found.samples]
        pixels = yield from self._autoencoder.decode(latents, order)
        return Rendered(pixels, latents, found.steps)

    def _conditions(self, order: Order, length: int) -> list[Condition]:
        prompts = [job.prompt for job in order.jobs]
        tokens = [self._t5.tokens(prompt, length, most=LENGTH) for prompt in prompts]
        with self._parts.use(self._clip.name) as part:
            # T5 reads all of a prompt; CLIP's pooled embedding is that of its first window.
            windows = [self._clip.windows(prompt, weighted=False) for prompt in prompts]
            pooled = self._clip.encode(part, windows, "last_hidden_state", "pooler_output")
        with self._parts.use(self._t5.name) as part:
            states = self._t5.encode(part, tokens)
        return [self._condition(order, *both) for both in zip(states, pooled, strict=True)]

    def _condition(self, order: Order, states: Array, short: Encoded) -> Condition:
        assert short.pooled is not None  # asked for
        found = {"encoder_hidden_states": states, "pooled_projections": short.pooled}
        if self._told:
            found["guidance"] = np.array(order.guidance, np.float32)  # []
        return Condition(found, None)


def _schedule(order: Order, tokens: int) -> Scheduler:
    """Levels from 1 down in equal steps, shifted by the size of the image, or the scheduler's own spacing."""
    config = order.open_scheduler.config()
    own = isinstance(config.settings, FlowMatchEulerSettings)
    sigmas = np.linspace(1.0, 1 / order.steps, order.steps).tolist() if own else None
    return order.open_scheduler(sigmas=sigmas, mu=shift_of(config, tokens))


def packed(latents: Array) -> Array:
    """Latents [B, C, h, w] as packages [B, h * w / 4, C * 4]."""
    rows, channels, height, width = latents.shape
    split = latents.reshape(rows, channels, height // PACK, PACK, width // PACK, PACK)
    return np.ascontiguousarray(split.transpose(0, 2, 4, 1, 3, 5)).reshape(rows, -1, channels * PACK**2)


def unpacked(packages: Array, height: int, width: int) -> Array:
    """The latents [B, C, h, w] of packages."""
    rows, _, values = packages.shape
    split = packages.reshape(rows, height // PACK, width // PACK, values // PACK**2, PACK, PACK)
    return np.ascontiguousarray(split.transpose(0, 3, 1, 4, 2, 5)).reshape(rows, -1, height, width)


def places(height: int, width: int) -> Array:
    """Row and column of each package, behind a zero: [h * w / 4, 3]."""
    found = np.zeros((height // PACK, width // PACK, 3), np.float32)
    found[..., 1] = np.arange(height // PACK)[:, None]
    found[..., 2] = np.arange(width // PACK)[None, :]
    return found.reshape(-1, 3)
