"""Where a trajectory of latents starts: from noise, or from an image with noise, a part of which may be kept.

    start = LatentStart(order, shape, posterior)
    beginning = start(scheduler, rows)

Which draws of a job's generator go into what, and in which order, is as in diffusers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fmedge_runtimes.parts import Parts
from fmedge_runtimes.pipelines.autoencoder import Autoencoder, Posterior
from fmedge_runtimes.pipelines.pipeline import Array, Order
from fmedge_runtimes.pipelines.stage import Beginning
from fmedge_runtimes.pipelines.trajectory import Amend
from fmedge_runtimes.schedulers.scheduler import Scheduler


def posterior_of(parts: Parts, autoencoder: Autoencoder, order: Order) -> Posterior | None:
    """What the encoder says of the image that an order starts from; None without one. Raises BackendError."""
    if order.image is None:
        return None
    with parts.use(autoencoder.encoder) as part:
        return autoencoder.encode(part, order.image, order.options.tiling)


def _as_it_is(latents: Array) -> Array:
    return latents


@dataclass(frozen=True, slots=True)
class LatentStart:
    """Begins batches of an order; a `stage.Begin`."""

    order: Order
    shape: tuple[int, int, int]
    """Of an image's latents [C, h, w]."""
    image: Posterior | None = None
    """Where to start from; None: from noise."""
    pack: Callable[[Array], Array] = _as_it_is
    """From latents [B, C, h, w] to the form in which they are denoised."""

    def __call__(self, scheduler: Scheduler, rows: Sequence[int]) -> Beginning:
        """The beginning of a batch."""
        order = self.order
        original = None if self.image is None else self.image.sample(order.normal, rows)
        noise = order.normal(rows, self.shape)  # [B, C, h, w]
        if original is None or (order.mask is not None and order.strength == 1):
            start = noise * np.float32(scheduler.init_noise_sigma)
        else:
            start = scheduler.add_noise(original, noise, 0)
        if original is None or order.mask is None:
            return Beginning(self.pack(start))
        height, width = order.mask.shape[1] // self.shape[1], order.mask.shape[2] // self.shape[2]
        mask = np.broadcast_to(order.mask[None, :, ::height, ::width], noise.shape)  # [B, C, h, w]
        kept = keeping(scheduler, self.pack(mask), self.pack(original), self.pack(noise))
        return Beginning(self.pack(start), amend=kept)


def keeping(scheduler: Scheduler, mask: Array, original: Array, noise: Array) -> Amend:
    """Puts the original, noised as much as the sample, back where the mask is dark."""

    def amend(sample: Array, index: int) -> Array:
        last = index + 1 == len(scheduler.timesteps)
        kept = original if last else scheduler.add_noise(original, noise, index + 1)
        return (1 - mask) * kept + mask * sample

    return amend
