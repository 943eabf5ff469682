"""SANA: Xie et al. 2024, arXiv 2410.10629. Linear attention over the latents of a deep-compression autoencoder.

Gemma's states condition it. In front of the prompt stands an instruction to enhance it, which the model was trained
with; the bundle has its text beside the tokenizer. Of the states only the first and those behind it are kept.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fmedge_runtimes.errors import BundleDamagedError
from fmedge_runtimes.parts import Parts
from fmedge_runtimes.pipelines.autoencoder import Autoencoder
from fmedge_runtimes.pipelines.masked_text import masked_conditions, plain
from fmedge_runtimes.pipelines.padded_text import PaddedText, Tokens, length_of
from fmedge_runtimes.pipelines.pipeline import (
    AUTOENCODER,
    GUIDED,
    PADDED,
    Array,
    Order,
    Progress,
    Render,
    Rendered,
    Sizes,
)
from fmedge_runtimes.pipelines.stage import TRANSFORMER, Stage, sample

LENGTH = 300
"""Tokens that the denoiser sees, unless the request says otherwise."""
INSTRUCTION = "tokenizer/instruction.txt"
"""What stands in front of a prompt, up to its last character."""


def open_sana(parts: Parts) -> Sana:
    """The pipeline on the parts of a bundle. Raises BundleError when one is missing."""
    return Sana(parts)


class Sana:
    """Gemma, a transformer and an autoencoder."""

    takes = GUIDED | AUTOENCODER | PADDED

    def __init__(self, parts: Parts) -> None:
        """Raises BundleError when a part or one of its fields is missing."""
        parts.require("transformer", "vae_decoder")
        self._parts = parts
        self._text = PaddedText(parts)
        path = parts.folder / INSTRUCTION
        try:
            self._instruction = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BundleDamagedError(
                f"cannot read {path} ({error}), which stands in front of every prompt; export the bundle again."
            ) from error
        self._autoencoder = Autoencoder(parts)
        transformer = parts.config("transformer")
        scale = np.float32(transformer.number("timestep_scale", 1.0))
        self._form = replace(TRANSFORMER, timestep_of=lambda timestep: timestep * scale)
        self.sizes = Sizes(self._autoencoder.factor * transformer.whole("patch_size"))

    def render(self, order: Order) -> Render:
        """Make the images; see `pipeline.Pipeline`."""
        length = length_of(order.options.max_sequence_length, LENGTH, None)
        prompts = [self._tokens(job.prompt, length) for job in order.jobs]
        guided = order.guidance > 1
        negatives = [self._text.tokens(plain(job.negative or ""), length) for job in order.jobs if guided]

        def kept(values: Array) -> Array:
            return np.concatenate([values[:1], values[len(values) - length + 1 :]])

        conditions = masked_conditions(self._parts, self._text, prompts, negatives, kept)
        yield Progress("encode", len(order.jobs), len(order.jobs))
        factor = self._autoencoder.factor
        shape = (self._autoencoder.channels, order.height // factor, order.width // factor)
        stage = Stage(
            "transformer",
            self._form,
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

    def _tokens(self, prompt: str, length: int) -> Tokens:
        """A prompt behind the instruction; the two ends that both would have are counted once, as in diffusers."""
        before = self._text.count(self._instruction) if self._instruction else 2
        return self._text.tokens(plain(prompt), before + length - 2, before=self._instruction)
