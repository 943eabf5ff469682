"""Stable Diffusion 1.x and 2.x, and latent consistency models made of them: Rombach et al. 2022, arXiv 2112.10752.

One CLIP text encoder, whose states the UNet attends to.
"""

from __future__ import annotations

from fmedge_runtimes.parts import Parts
from fmedge_runtimes.pipelines.clip_text import ClipText, check_layers, paired
from fmedge_runtimes.pipelines.condition import Condition
from fmedge_runtimes.pipelines.latent_unet import LatentUnet
from fmedge_runtimes.pipelines.pipeline import Array, Order

STATES = "encoder_hidden_states"


def open_stable_diffusion(parts: Parts) -> LatentUnet:
    """The pipeline on the parts of a bundle. Raises BundleError when one is missing."""
    return LatentUnet(parts, ClipStates(parts))


class ClipStates:
    """One CLIP text encoder: a `latent_unet.Texts`."""

    def __init__(self, parts: Parts, encoder: str = "text_encoder", tokenizer: str = "tokenizer") -> None:
        self._parts = parts
        self._text = ClipText(parts, encoder, tokenizer)

    def check(self, order: Order) -> None:
        """See `latent_unet.Texts`."""
        check_layers(self._text, order.options.clip_skip, kept=1)

    def encode(self, order: Order, *, guided: bool) -> list[Condition]:
        """See `latent_unet.Texts`."""
        pairs = paired([self._text], order, guided=guided)
        positive = [pair.positive[0] for pair in pairs.values()]
        negative = [pair.negative[0] for pair in pairs.values() if pair.negative is not None]
        skip = order.options.clip_skip
        # Inner states go through the norm that stands behind the last layer.
        states = f"normed_hidden_states.{self._text.layers - skip}" if skip else "last_hidden_state"
        with self._parts.use(self._text.name) as part:
            toward = self._text.encode(part, positive, states, None)
            # Layers are skipped for the prompt only, as in diffusers.
            away = self._text.encode(part, negative, "last_hidden_state", None) if negative else []
        halves: list[dict[str, Array]] = [{STATES: one.states} for one in toward]
        others: list[dict[str, Array] | None] = [{STATES: one.states} for one in away] or [None] * len(halves)
        found = dict(zip(pairs, map(Condition, halves, others), strict=True))
        return [found[job.prompt, job.negative] for job in order.jobs]
