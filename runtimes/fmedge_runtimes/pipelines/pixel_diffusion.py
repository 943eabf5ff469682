"""The pipeline that `fmedge train image` writes: a transformer that denoises pixels, with no autoencoder.

The states of one CLIP text encoder, and its pooled embedding where the transformer's config has a place for it, go to a
transformer of diffusers, whose output goes to the scheduler as it is: the scheduler's config says what it predicts. The
folder has a pipeline.py for diffusers, which is not run: the class is known by its name.
"""

from __future__ import annotations

from fmedge_runtimes.parts import Parts
from fmedge_runtimes.pipelines.autoencoder import to_pixels
from fmedge_runtimes.pipelines.clip_text import ClipText
from fmedge_runtimes.pipelines.condition import Condition
from fmedge_runtimes.pipelines.pipeline import GUIDED, Array, Order, Pixels, Progress, Render, Rendered, Sizes
from fmedge_runtimes.pipelines.stage import TRANSFORMER, Stage, sample
from fmedge_runtimes.pipelines.trajectory import stacked


def open_pixel_diffusion(parts: Parts) -> PixelDiffusion:
    """The pipeline on the parts of a bundle. Raises BundleError when one is missing."""
    return PixelDiffusion(parts)


class PixelDiffusion:
    """One text encoder and one transformer."""

    takes = GUIDED

    def __init__(self, parts: Parts) -> None:
        """Raises BundleError when a part or one of its fields is missing."""
        parts.require("transformer")
        self._parts = parts
        self._text = ClipText(parts)
        transformer = parts.config("transformer")
        self._channels = transformer.whole("in_channels")
        patch = transformer.whole("patch_size")
        self._pooled = transformer.whole("pooled_projection_dim", 0) > 0
        # Rotary places go on; a table of them ends.
        places = transformer.whole("pos_embed_max_size", 0)
        self.sizes = Sizes(patch, most=patch * places if places else None)

    def render(self, order: Order) -> Render:
        """Make the images; see `pipeline.Pipeline`."""
        conditions = self._conditions(order)
        yield Progress("encode", len(order.jobs), len(order.jobs))
        stage = Stage(
            "transformer",
            TRANSFORMER,
            (self._channels, order.height, order.width),
            order.open_scheduler,
            guidance=order.guidance,
            rescale=order.options.guidance_rescale,
            preview=_pixels,
        )
        found = yield from sample(self._parts, stage, conditions, order)
        pixels = _pixels(stacked(found.samples, range(len(order.jobs))))
        return Rendered(pixels, found.samples, found.steps)

    def _conditions(self, order: Order) -> list[Condition]:
        texts = [job.prompt for job in order.jobs]
        if order.guidance > 1:
            texts += [job.negative or "" for job in order.jobs]
        windows = [self._text.window(text) for text in texts]
        with self._parts.use(self._text.name) as part:
            pooled = "pooler_output" if self._pooled else None
            encoded = self._text.encode(part, windows, "last_hidden_state", pooled)
        inputs: list[dict[str, Array]] = []
        for one in encoded:
            own = {"encoder_hidden_states": one.states}
            inputs.append(own if one.pooled is None else {**own, "pooled_projections": one.pooled})
        count = len(order.jobs)
        negatives: list[dict[str, Array]] | list[None] = inputs[count:] or [None] * count
        return [Condition(*both) for both in zip(inputs[:count], negatives, strict=True)]


def _pixels(image: Array) -> list[Pixels]:
    return list(to_pixels(image))
