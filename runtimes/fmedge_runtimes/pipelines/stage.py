"""A denoiser put to work for all images of an order, from noise to samples: most pipelines are one or more of these.

stage = Stage("transformer", TRANSFORMER, shape, order.open_scheduler, guidance=order.guidance)
found = yield from sample(parts, stage, conditions, order)
found.samples, found.steps
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np

from fmedge_runtimes.parts import Parts
from fmedge_runtimes.pipelines.condition import Condition, together
from fmedge_runtimes.pipelines.control import Guides
from fmedge_runtimes.pipelines.denoiser import Conditions, Denoiser, Form
from fmedge_runtimes.pipelines.pipeline import Array, Order, Progress
from fmedge_runtimes.pipelines.trajectory import Amend, Predict, Preview, check_varied, denoise
from fmedge_runtimes.schedulers.scheduler import Scheduler

TRANSFORMER = Form(sample="hidden_states", output="out_hidden_states", timestep_rows=True)
"""Diffusers' transformers, which are given a scheduler's timesteps as they are."""


@dataclass(frozen=True, slots=True)
class Beginning:
    """Where the trajectory of a batch starts, and what it is held to."""

    start: Array
    """[B, ...]"""
    channels: Array | None = None
    """Channels that are shown to the denoiser behind the sample's, at every step [B, C, ...]."""
    amend: Amend | None = None


Begin = Callable[[Scheduler, Sequence[int]], Beginning]
"""(scheduler, jobs of a batch) -> its beginning; it draws what diffusers draws there."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One denoiser of a pipeline."""

    part: str
    form: Form
    """How the part is fed."""
    shape: Sequence[int]
    """Of a sample, without the row axis."""
    scheduler: Callable[[], Scheduler]
    """Begins a trajectory of one batch."""
    guidance: float = 1.0
    """Used where conditions have a negative half."""
    rescale: float = 0.0
    guided_channels: int | None = None
    """Of the prediction; None: all. What is behind them, a learned variance, stays the conditional one."""
    learned_variance: bool = False
    """Whether the scheduler is given the channels that the denoiser predicts beside those of the sample."""
    shared: Mapping[str, Array] = field(default_factory=dict)
    """Inputs of the denoiser without a row axis."""
    begin: Begin | None = None
    """None: noise alone."""
    last: str | None = None
    """The part that takes the last step, if that is another one."""
    fold: bool = False
    """Whether a sample's first axis is one of rows of the denoiser, as it is of every condition: several for a job."""
    guides: Guides | None = None
    """ControlNets, for a denoiser that takes what they give."""
    preview: Preview | None = None


@dataclass(frozen=True, slots=True)
class Sampled:
    """What a stage gives, in the order of the jobs."""

    samples: list[Array]
    steps: int
    """Calls of the denoiser that each image took part in, guidance counted once."""
    constants: Mapping[str, Array]
    """Of the denoiser's outputs, those that its form names so."""


def sample(
    parts: Parts, stage: Stage, conditions: Sequence[Condition], order: Order
) -> Generator[Progress, None, Sampled]:
    """Run a stage for every job. Raises BackendError, and RequestError for steps that the scheduler cannot take."""
    samples: dict[int, Array] = {}
    steps, constants = 0, {}
    with ExitStack() as opened:
        each = [opened.enter_context(parts.use(name)) for name in (stage.part, stage.last) if name is not None]
        guides = stage.guides
        nets = [opened.enter_context(parts.use(one.control.net)) for one in ([] if guides is None else guides.each)]
        for rows in order.batches([condition.alike for condition in conditions]):
            scheduler = stage.scheduler()
            begin = _from_noise(order, stage, scheduler, rows) if stage.begin is None else stage.begin(scheduler, rows)
            residuals = None if guides is None else guides.batch(each[0], nets, rows, len(scheduler.timesteps))
            batch = _batch(stage, [conditions[row] for row in rows], begin.channels)
            denoisers = [
                Denoiser(
                    part,
                    stage.form,
                    batch,
                    guidance=stage.guidance,
                    rescale=stage.rescale,
                    split=order.split_guidance,
                    guided_channels=stage.guided_channels,
                    residuals=residuals,
                )
                for part in each
            ]
            found = yield from denoise(
                _predict(denoisers, scheduler, fold=stage.fold),
                scheduler,
                begin.start,
                order,
                rows,
                amend=begin.amend,
                preview=stage.preview,
                learned_variance=stage.learned_variance,
            )
            check_varied(stage.part, found)
            samples.update(zip(rows, found, strict=True))
            steps, constants = len(scheduler.timesteps), denoisers[0].constants
    return Sampled([samples[row] for row in range(len(conditions))], steps, constants)


def _batch(stage: Stage, conditions: Sequence[Condition], channels: Array | None) -> Conditions:
    negatives = [one.negative for one in conditions if one.negative is not None]
    halves = [together([one.positive for one in conditions]), together(negatives) if negatives else None]
    if stage.fold:
        halves = [None if half is None else {name: _rows(value) for name, value in half.items()} for half in halves]
    positive, negative = halves
    assert positive is not None
    return Conditions(positive, negative, stage.shared, channels)


def _rows(values: Array) -> Array:
    """[B, R, ...] as [B * R, ...]."""
    return values.reshape(-1, *values.shape[2:])


def _predict(denoisers: Sequence[Denoiser], scheduler: Scheduler, *, fold: bool) -> Predict:
    end = float(scheduler.timesteps[-1])

    def predict(values: Array, timestep: float, index: int) -> Array:
        denoiser = denoisers[-1] if timestep == end else denoisers[0]
        found = denoiser(_rows(values) if fold else values, timestep, index)
        return found.reshape(values.shape) if fold else found

    return predict


def _from_noise(order: Order, stage: Stage, scheduler: Scheduler, rows: Sequence[int]) -> Beginning:
    return Beginning(order.normal(rows, stage.shape) * np.float32(scheduler.init_noise_sigma))
