"""A scheduler's steps with a denoiser, for one batch: from noise, or from an image, to latents.

latents = yield from denoise(denoiser, scheduler, start, order, rows)
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

import numpy as np

from fmedge_runtimes.errors import BackendError
from fmedge_runtimes.pipelines.pipeline import Array, Order, Pixels, Progress
from fmedge_runtimes.schedulers.scheduler import Scheduler

Predict = Callable[[Array, float, int], Array]
"""(sample, timestep, number of the step) -> prediction"""
Amend = Callable[[Array, int], Array]
"""(sample behind step `index`, index) -> the sample to go on with: what inpainting keeps."""
Preview = Callable[[Array], list[Pixels]]


def denoise(
    predict: Predict,
    scheduler: Scheduler,
    sample: Array,
    order: Order,
    rows: Sequence[int],
    *,
    amend: Amend | None = None,
    preview: Preview | None = None,
    learned_variance: bool = False,
) -> Generator[Progress, None, Array]:
    """Run all steps of a trajectory from a sample [B, ...] at its first timestep; the sample at its end.

    `preview` makes images of a predicted clean sample. Without `learned_variance` the scheduler is given as many
    channels as the sample has: what a model predicts beside them is dropped. Raises BackendError.
    """
    timesteps = [float(timestep) for timestep in scheduler.timesteps]
    draw = order.draw(rows, sample.shape[1:])
    every = order.options.preview_every
    for index, timestep in enumerate(timesteps):
        output = predict(scheduler.scale(sample, index), timestep, index)
        if not learned_variance:
            output = output[:, : sample.shape[1]]
        step = scheduler.step(output, index, sample, draw)
        sample = step.sample if amend is None else amend(step.sample, index)
        shown = None
        if preview is not None and every and (index + 1) % every == 0:
            clean = sample if step.denoised is None else step.denoised
            shown = _later(preview, clean)
        yield Progress("denoise", index + 1, len(timesteps), tuple(rows), shown)
    return sample


def _later(preview: Preview, clean: Array) -> Callable[[], list[Pixels]]:
    return lambda: preview(clean)


def check_varied(part: str, latents: Array) -> None:
    """Raise BackendError naming the part if a row's values are all the same: there is no image in them."""
    flat = latents.reshape(len(latents), -1)
    if (flat.min(axis=1) == flat.max(axis=1)).any():
        raise BackendError(f"{part} gave one value everywhere, so there is no image; report this.")


def stacked(values: Sequence[Array], rows: Sequence[int]) -> Array:
    """The values of some jobs as one array [B, ...]."""
    return np.stack([values[row] for row in rows])
