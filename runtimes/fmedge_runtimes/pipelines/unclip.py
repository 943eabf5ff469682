"""unCLIP, the design of DALL-E 2: Ramesh et al. 2022, arXiv 2204.06125. Four denoisers in one bundle.

A prior makes CLIP's embedding of an image from the prompt; a UNet that is given it, and the prompt's states, makes a
small image, and one more pair of UNets a larger one, of which the second takes the last step. Steps and guidance of a
request are those of the small image. Sizes are the models' own.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import partial

import numpy as np

from fmedge_runtimes.errors import RequestError
from fmedge_runtimes.parts import Part, Parts
from fmedge_runtimes.pipelines.autoencoder import to_pixels
from fmedge_runtimes.pipelines.condition import Condition
from fmedge_runtimes.pipelines.enlarge import bicubic
from fmedge_runtimes.pipelines.image_prior import ImagePrior, Text
from fmedge_runtimes.pipelines.latent_unet import UNET
from fmedge_runtimes.pipelines.pipeline import Array, Order, Pixels, Progress, Render, Rendered, Sizes
from fmedge_runtimes.pipelines.stage import Beginning, Sampled, Stage, sample
from fmedge_runtimes.pipelines.trajectory import stacked
from fmedge_runtimes.pipelines.variance import learns_variance
from fmedge_runtimes.schedulers.scheduler import Scheduler

PRIOR_STEPS, PRIOR_GUIDANCE, LARGER_STEPS = 25, 4.0, 7
"""Of the prior, and of the larger image, which no option changes."""
DECODER_SCHEDULER = "decoder_scheduler"


def open_unclip(parts: Parts) -> UnClip:
    """The pipeline on the parts of a bundle. Raises BundleError when one is missing."""
    return UnClip(parts)


class UnClip:
    """CLIP's text encoder, a prior, a projection of its results, and three UNets."""

    takes = frozenset({"guidance", "guidance_rescale"})

    def __init__(self, parts: Parts) -> None:
        """Raises BundleError when a part or one of its fields is missing."""
        parts.require("text_proj", "decoder", "super_res_first", "super_res_last")
        self._parts = parts
        self._prior = ImagePrior(parts, "prior", "text_encoder", "tokenizer")
        decoder, larger = parts.config("decoder"), parts.config("super_res_first")
        self._channels = decoder.whole("in_channels")
        self._small, self._side = decoder.whole("sample_size"), larger.whole("sample_size")
        self.sizes = Sizes(self._side, fixed=True)

    def render(self, order: Order) -> Render:
        """Make the images; see `pipeline.Pipeline`."""
        if (order.height, order.width) != (self._side, self._side):
            raise RequestError(
                f"{order.width}x{order.height} cannot be made; {self._parts.folder} makes {self._side}x{self._side}."
            )
        count = len(order.jobs)
        *texts, empty = self._prior.texts([*(job.prompt for job in order.jobs), ""])
        yield Progress("encode", count, count)
        schedule = partial(order.open_scheduler, "prior_scheduler", chosen=False, steps=PRIOR_STEPS)
        made, before = yield from self._prior.embed(
            order, [[text] for text in texts], [empty] * count, schedule, PRIOR_GUIDANCE
        )
        stage = Stage(
            "decoder",
            UNET,
            (self._channels, self._small, self._small),
            order.open_scheduler,
            guidance=order.guidance,
            rescale=order.options.guidance_rescale,
            guided_channels=self._channels,
            learned_variance=learns_variance(order.open_scheduler.config()),
            preview=_pixels,
        )
        conditions = self._conditions(order, texts, empty, [one[0] for one in made])
        small = yield from sample(self._parts, stage, conditions, order)
        found = yield from self._larger(order, [np.clip(image, -1, 1) for image in small.samples])
        pixels = _pixels(stacked(found.samples, range(count)))
        return Rendered(pixels, found.samples, before + small.steps + found.steps)

    def _conditions(self, order: Order, texts: Sequence[Text], empty: Text, made: Sequence[Array]) -> list[Condition]:
        """What the decoder is given of each job's text and embedding [D]; without the image's for guidance."""
        with self._parts.use("text_proj") as part:
            found = [self._projected(part, text, image) for text, image in zip(texts, made, strict=True)]
            nothing = found[0][1]
            other = self._projected(part, empty, nothing)[0] if order.guidance > 1 else None
        return [Condition(own, other) for own, _ in found]

    @staticmethod
    def _projected(part: Part, text: Text, image: Array) -> tuple[dict[str, Array], Array]:
        """Inputs of the decoder, and the embedding that stands for no image [D]."""
        outputs = part.run(
            {
                "image_embeddings": image[None],
                "prompt_embeds": text["proj_embedding"][None],
                "text_encoder_hidden_states": text["encoder_hidden_states"][None],
            }
        )
        states = part.output("encoder_hidden_states", outputs)[0]  # [E + S, D]
        seen = np.ones(len(states), np.float32)
        seen[len(states) - len(text["attention_mask"]) :] = text["attention_mask"]
        labels = part.output("class_labels", outputs)[0]
        nothing = part.output("unconditional_image_embeddings", outputs)
        return {"encoder_hidden_states": states, "class_labels": labels, "attention_mask": seen}, nothing.reshape(-1)

    def _larger(self, order: Order, small: Sequence[Array]) -> Generator[Progress, None, Sampled]:
        """Larger images of small ones [C, h, w]."""
        shape = (self._channels, self._side, self._side)

        def begin(scheduler: Scheduler, rows: Sequence[int]) -> Beginning:
            start = order.normal(rows, shape) * np.float32(scheduler.init_noise_sigma)
            return Beginning(start, channels=bicubic(stacked(small, rows), self._side, self._side))

        schedule = partial(order.open_scheduler, "super_res_scheduler", chosen=False, steps=LARGER_STEPS)
        stage = Stage("super_res_first", UNET, shape, schedule, begin=begin, last="super_res_last", preview=_pixels)
        return (yield from sample(self._parts, stage, [Condition({}, None)] * len(small), order))


def _pixels(image: Array) -> list[Pixels]:
    return list(to_pixels(image))
