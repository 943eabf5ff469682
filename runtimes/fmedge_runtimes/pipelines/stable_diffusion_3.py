"""Stable Diffusion 3 and 3.5: Esser et al. 2024, arXiv 2403.03206.

Two CLIP text encoders stand side by side, filled up with zeros to the width of T5, whose states stand behind them; a
folder may come without T5, and has zeros instead. CLIP's pooled embeddings go to the transformer beside them.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from fmedge_runtimes.parts import Parts
from fmedge_runtimes.pipelines.autoencoder import Autoencoder
from fmedge_runtimes.pipelines.clip_text import ClipText, Encoded, check_layers
from fmedge_runtimes.pipelines.condition import Condition
from fmedge_runtimes.pipelines.latent_start import LatentStart, posterior_of
from fmedge_runtimes.pipelines.padded_text import PaddedText, length_of
from fmedge_runtimes.pipelines.pipeline import (
    AUTOENCODER,
    FROM_IMAGE,
    GUIDED,
    PADDED,
    Array,
    Order,
    Progress,
    Render,
    Rendered,
    Sizes,
)
from fmedge_runtimes.pipelines.shift import shift_of
from fmedge_runtimes.pipelines.stage import TRANSFORMER, Stage, sample

LENGTH, MOST = 256, 512
"""Tokens that T5 reads, unless the request says otherwise; and at most."""


def open_stable_diffusion_3(parts: Parts) -> StableDiffusion3:
    """The pipeline on the parts of a bundle. Raises BundleError when one is missing."""
    return StableDiffusion3(parts)


class StableDiffusion3:
    """Up to three text encoders, a transformer and an autoencoder."""

    takes = GUIDED | FROM_IMAGE | AUTOENCODER | PADDED | {"mask", "clip_skip"}

    def __init__(self, parts: Parts) -> None:
        """Raises BundleError when a part or one of its fields is missing."""
        parts.require("transformer", "vae_decoder")
        self._parts = parts
        self._texts = _Texts(parts)
        self._autoencoder = Autoencoder(parts)
        transformer = parts.config("transformer")
        self._patch = transformer.whole("patch_size")
        side = self._autoencoder.factor * self._patch
        self.sizes = Sizes(side, most=side * transformer.whole("pos_embed_max_size"))

    def render(self, order: Order) -> Render:
        """Make the images; see `pipeline.Pipeline`."""
        if order.image is not None:
            self._parts.require(self._autoencoder.encoder)
        conditions = self._texts.encode(order)
        yield Progress("encode", len(order.jobs), len(order.jobs))
        image = posterior_of(self._parts, self._autoencoder, order)
        factor = self._autoencoder.factor
        shape = (self._autoencoder.channels, order.height // factor, order.width // factor)
        tokens = shape[1] // self._patch * (shape[2] // self._patch)
        mu = shift_of(order.open_scheduler.config(), tokens)
        stage = Stage(
            "transformer",
            TRANSFORMER,
            shape,
            partial(order.open_scheduler, mu=mu),
            guidance=order.guidance,
            rescale=order.options.guidance_rescale,
            begin=LatentStart(order, shape, image),
            preview=self._autoencoder.preview,
        )
        found = yield from sample(self._parts, stage, conditions, order)
        pixels = yield from self._autoencoder.decode(found.samples, order)
        return Rendered(pixels, found.samples, found.steps)


class _Texts:
    """Two CLIP encoders, and T5 if the bundle has it."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._clips = [ClipText(parts, f"text_encoder{suffix}", f"tokenizer{suffix}") for suffix in ("", "_2")]
        self._t5 = PaddedText(parts, "text_encoder_3", "tokenizer_3") if parts.declared("text_encoder_3") else None
        self._width = parts.config("transformer").whole("joint_attention_dim")

    def encode(self, order: Order) -> list[Condition]:
        """The conditions of each job; equal prompts are encoded once."""
        length = length_of(order.options.max_sequence_length, LENGTH, MOST)
        skip = order.options.clip_skip
        for clip in self._clips:
            check_layers(clip, skip, kept=2)
        guided = order.guidance > 1
        texts = [job.prompt for job in order.jobs]
        negatives = [job.negative or "" for job in order.jobs] if guided else []
        # A prompt and its negative one share a batch, and so have as many windows.
        windows = [self._windows(prompt) for prompt in texts]
        if guided:
            windows = [max(own, self._windows(negative)) for own, negative in zip(windows, negatives, strict=True)]
        long = self._long([*texts, *negatives], length)
        positive = self._short(texts, windows, skip)
        # Layers are skipped for the prompt only, as in diffusers.
        negative = self._short(negatives, windows, 0) if guided else []
        inputs = [self._inputs(*both) for both in zip([*positive, *negative], long, strict=True)]
        count = len(texts)
        others: list[dict[str, Array]] | list[None] = inputs[count:] if guided else [None] * count
        return [Condition(*both) for both in zip(inputs[:count], others, strict=True)]

    def _windows(self, prompt: str) -> int:
        return max(len(clip.windows(prompt, weighted=False).ids) for clip in self._clips)

    def _long(self, texts: list[str], length: int) -> list[Array]:
        """T5's states [S, D] of each text, or zeros."""
        if self._t5 is None:
            return [np.zeros((length, self._width), np.float32)] * len(texts)
        tokens = [self._t5.tokens(text, length, most=MOST) for text in texts]
        with self._parts.use(self._t5.name) as part:
            return self._t5.encode(part, tokens)

    def _short(self, texts: list[str], windows: list[int], skip: int) -> list[list[Encoded]]:
        """What both CLIP encoders say of each text."""
        each = []
        for clip in self._clips:
            tokens = [
                clip.windows(text, weighted=False, least=least) for text, least in zip(texts, windows, strict=True)
            ]
            with self._parts.use(clip.name) as part:
                each.append(clip.encode(part, tokens, f"hidden_states.{clip.layers - 1 - skip}", "text_embeds"))
        return [list(both) for both in zip(*each, strict=True)]

    def _inputs(self, short: list[Encoded], long: Array) -> dict[str, Array]:
        states = np.concatenate([one.states for one in short], axis=-1)  # [W * S, D1 + D2]
        states = np.pad(states, ((0, 0), (0, long.shape[1] - states.shape[1])))
        pooled = [one.pooled for one in short if one.pooled is not None]
        return {
            "encoder_hidden_states": np.concatenate([states, long]),
            "pooled_projections": np.concatenate(pooled),
        }
