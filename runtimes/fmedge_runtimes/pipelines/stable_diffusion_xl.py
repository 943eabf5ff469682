"""Stable Diffusion XL, its refiner and Turbo: Podell et al. 2023, arXiv 2307.01952.

Two CLIP text encoders (the refiner has the second alone): their states before the last layer stand side by side, and
the second's pooled embedding goes to the UNet beside the sizes of the image.
"""

from __future__ import annotations

import numpy as np

from fmedge_runtimes.parts import Parts
from fmedge_runtimes.pipelines.clip_text import ClipText, Encoded, Windows, check_layers, paired
from fmedge_runtimes.pipelines.condition import Condition
from fmedge_runtimes.pipelines.latent_unet import LatentUnet
from fmedge_runtimes.pipelines.pipeline import Array, Order

GOOD, BAD = 6.0, 2.5
"""Aesthetic scores of prompt and negative prompt, for a UNet that was trained with them: diffusers' defaults."""


def open_stable_diffusion_xl(parts: Parts) -> LatentUnet:
    """The pipeline on the parts of a bundle. Raises BundleError when one is missing."""
    return LatentUnet(parts, _Texts(parts))


class _Texts:
    """Two text encoders, or the second alone."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        parts.require("text_encoder_2")
        self._texts = [
            ClipText(parts, f"text_encoder{suffix}", f"tokenizer{suffix}")
            for suffix in ("", "_2")
            if suffix or parts.declared("text_encoder")
        ]
        self._zeros = parts.index.flag("force_zeros_for_empty_prompt", True)
        self._scored = parts.index.flag("requires_aesthetics_score")

    def check(self, order: Order) -> None:
        """See `latent_unet.Texts`."""
        for text in self._texts:
            check_layers(text, order.options.clip_skip, kept=2)

    def encode(self, order: Order, *, guided: bool) -> list[Condition]:
        """See `latent_unet.Texts`."""
        pairs = paired(self._texts, order, guided=guided)
        toward = self._encoded([pair.positive for pair in pairs.values()], order.options.clip_skip)
        # Layers are skipped for the prompt only, as in diffusers.
        away = self._encoded([pair.negative for pair in pairs.values() if pair.negative is not None], 0)
        found = {}
        for number, (key, one) in enumerate(zip(pairs, toward, strict=True)):
            other = None
            if guided and key[1] is None and self._zeros:
                other = Encoded(np.zeros_like(one.states), np.zeros_like(one.pooled))
            elif guided:
                other = away[number]
            found[key] = Condition(
                self._inputs(one, order, GOOD), None if other is None else self._inputs(other, order, BAD)
            )
        return [found[job.prompt, job.negative] for job in order.jobs]

    def _encoded(self, prompts: list[tuple[Windows, ...]], skip: int) -> list[Encoded]:
        """States of all encoders [S, D1 + D2], and the second's pooled embedding."""
        if not prompts:
            return []
        each = []
        for number, text in enumerate(self._texts):
            last = number == len(self._texts) - 1
            with self._parts.use(text.name) as part:
                states = f"hidden_states.{text.layers - 1 - skip}"
                windows = [prompt[number] for prompt in prompts]
                each.append(text.encode(part, windows, states, "text_embeds" if last else None))
        return [
            Encoded(np.concatenate([one.states for one in together], axis=-1), together[-1].pooled)
            for together in zip(*each, strict=True)
        ]

    def _inputs(self, text: Encoded, order: Order, score: float) -> dict[str, Array]:
        assert text.pooled is not None  # the second encoder's
        size = (order.height, order.width)
        # Size of the original, place of the crop, and what the image is to be.
        numbers = (*size, 0, 0, score) if self._scored else (*size, 0, 0, *size)
        return {
            "encoder_hidden_states": text.states,
            "text_embeds": text.pooled,
            "time_ids": np.array(numbers, np.float32),
        }
