"""What a family of pipelines is: the parts of a bundle put to work, as diffusers' class of that name does.

A family is one file. Its `render` is a generator: it yields a `Progress` behind every piece of work, so that whoever
runs it can stop between two of them, and returns the images. It has tools for what families share, and no backend code:

    clip_text.py        prompts through a CLIP text encoder, in windows and with weights
    padded_text.py      prompts through any other text encoder, padded to one length
    condition.py        what images are conditioned on, and the batches that share a call
    stage.py            a denoiser over all images: conditions, noise, scheduler, guidance; `sample`
    denoiser.py         a denoiser graph with guidance: (sample, timestep, step) -> prediction
    control.py          ControlNets beside a denoiser
    trajectory.py       a scheduler's steps with that denoiser; `denoise`
    autoencoder.py      images to latents and back, in tiles where they are large

    def render(self, order):
        ...                                             # encode all prompts, each once
        with self._parts.use("unet") as part:
            for rows in order.batches(lengths):         # rows that can share a call of the graph
                ...
                denoiser = Denoiser(part, FORM, Conditions(positive, negative), guidance=order.guidance)
                latents = yield from denoise(denoiser, scheduler, start, order, rows)
        pixels = yield from autoencoder.decode(latents, order)
        return Rendered(pixels, latents, evaluations)
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import numpy.typing as npt

from fmedge_runtimes.diffusion import Diffusion
from fmedge_runtimes.noise import TorchNoise, normal_rows
from fmedge_runtimes.schedulers import SchedulerConfig, open_scheduler, read_config, switch
from fmedge_runtimes.schedulers.scheduler import Draw, Scheduler

if TYPE_CHECKING:
    from PIL.Image import Image

    from fmedge_runtimes.pipelines.control import Control

Array = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]
Stage = Literal["encode", "denoise", "decode"]


@dataclass(frozen=True, slots=True)
class Job:
    """One image that is asked for."""

    prompt: str
    negative: str | None
    """None: the family's own idea of nothing."""
    seed: int
    prompt_index: int
    index: int
    """Among the images of its prompt."""


@dataclass(frozen=True, slots=True)
class OpenScheduler:
    """Begins a trajectory of one batch, with the bundle's scheduler or the one that the request names."""

    folder: Path
    """Of the bundle."""
    name: str | None
    """The scheduler that was asked for; None: the bundle's own."""
    steps: int
    strength: float
    respaced: bool
    """Whether a schedule of LCM's is spread over what the strength leaves."""
    main: str = "scheduler"
    """The folder of the scheduler that the name replaces."""
    read: Callable[[Path], SchedulerConfig] = read_config
    """Reads a scheduler's folder; a model remembers what it has read."""

    def config(self, part: str | None = None, *, chosen: bool = True) -> SchedulerConfig:
        """The config of a scheduler's folder, by default the main one's.

        With `chosen` False the request's name is not for this one. Raises BundleError, and RequestError for a name that
        is unknown or does not fit the model.
        """
        config = self.read(self.folder / (part or self.main))
        return config if self.name is None or not chosen else switch(config, self.name)

    def __call__(
        self,
        part: str | None = None,
        *,
        chosen: bool = True,
        steps: int | None = None,
        strength: float | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> Scheduler:
        """Open it; a cascade has several, and steps of its own for some. Raises RequestError, BundleError."""
        config = self.config(part, chosen=chosen)
        return open_scheduler(
            config,
            self.steps if steps is None else steps,
            strength=self.strength if strength is None else strength,
            sigmas=sigmas,
            mu=mu,
            respaced=self.respaced and config.class_name == "LCMScheduler",
        )


@dataclass(frozen=True, slots=True)
class Order:
    """What a family is to render; every option has its value."""

    jobs: tuple[Job, ...]
    options: Diffusion
    """As they were given, for what only some families know."""
    steps: int
    guidance: float
    height: int
    width: int
    image: Array | None
    """Where to start from, [3, height, width] in -1 to 1."""
    mask: Array | None
    """1 where the image is painted anew, else 0: [1, height, width]."""
    strength: float
    """1 without an image."""
    max_batch: int
    """Rows that go through a denoiser together at most."""
    split_guidance: bool
    """Whether guidance takes two calls of one batch, instead of one call of two."""
    open_scheduler: OpenScheduler
    references: tuple[Image, ...] = ()
    """What an IP-Adapter is shown: one image for all prompts, or one for each."""
    adapter_scale: float | None = None
    """Of a LoRA that is not merged; None: the bundle has none."""
    controls: tuple[Control, ...] = ()
    """What ControlNets are to do: those that are given an image."""
    _noises: list[TorchNoise] = field(init=False, default_factory=list)
    """The generator of each job, made with the first draw: what it draws depends on its own seed and on what it drew
    before alone."""

    @property
    def standing(self) -> dict[str, Array]:
        """Inputs that every graph is given that takes them."""
        shown = self.options.ip_adapter_scale if self.references else 0.0
        scales = {"adapter_scale": self.adapter_scale, "ip_adapter_scale": shown}
        return {name: np.array([scale], np.float32) for name, scale in scales.items() if scale is not None}

    def batches(self, alike: Sequence[object] | None = None) -> Iterator[list[int]]:
        """The numbers of jobs that go through a graph together: at most max_batch, and equal in what `alike` says.

        Rows of other shapes, such as prompts of other lengths, must never share a batch: padding would change them.
        """
        groups: dict[object, list[int]] = {}
        for number in range(len(self.jobs)):
            groups.setdefault(None if alike is None else alike[number], []).append(number)
        for rows in groups.values():
            for start in range(0, len(rows), self.max_batch):
                yield rows[start : start + self.max_batch]

    def normal(self, rows: Sequence[int], shape: Sequence[int]) -> Array:
        """The next noise of these jobs: [B, *shape], as diffusers draws with a list of generators."""
        if not self._noises:
            self._noises.extend(TorchNoise(job.seed) for job in self.jobs)
        return normal_rows([self._noises[row] for row in rows], shape)

    def draw(self, rows: Sequence[int], shape: Sequence[int]) -> Draw:
        """The same as a function, which schedulers call."""
        return lambda: self.normal(rows, shape)


@dataclass(frozen=True, slots=True)
class Progress:
    """A piece of work is done."""

    stage: Stage
    done: int
    """Steps, or rows where the stage has no steps."""
    total: int
    rows: tuple[int, ...] = ()
    """The jobs that it was done for; empty for all."""
    preview: Callable[[], list[Pixels]] | None = None
    """Makes small images [h, w, 3] of the rows as they are now, where that was asked for."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """What a family returns, in the order of the jobs."""

    pixels: list[Pixels]
    """[height, width, 3] each."""
    latents: list[npt.NDArray[np.float32]]
    """What the last denoiser gave [C, h, w] each, before it was decoded; in the units in which it is denoised."""
    evaluations: int
    """Calls of denoisers that each image took part in, guidance counted once."""


Render = Generator[Progress, None, Rendered]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Which sizes a family makes."""

    multiple: int
    """Of which height and width must be multiples."""
    fixed: bool = False
    """Whether the bundle's own size is the only one."""
    most: int | None = None
    """The longest side, where a model knows no place beyond it."""
    enlarges: int = 1
    """How many times larger an image is than the one that the request starts from: what an upscaler does."""


class Pipeline(Protocol):
    """A family, opened on the parts of a bundle. Its constructor reads configs, and no graph."""

    @property
    def sizes(self) -> Sizes: ...

    @property
    def takes(self) -> frozenset[str]:
        """The fields of Diffusion that it can follow beside those of every family (`EVERY`): the others are refused."""
        ...

    def render(self, order: Order) -> Render:
        """Make the images. Raises RequestError for what cannot be served, before any graph runs, and BackendError."""
        ...


EVERY = frozenset({"steps", "seed", "n", "height", "width", "scheduler", "preview_every", "adapter_scale"})
GUIDED = frozenset({"guidance", "negative", "guidance_rescale"})
FROM_IMAGE = frozenset({"image", "strength"})
"""Image to image; `mask` beside it is inpainting."""
AUTOENCODER = frozenset({"tiling", "tiny_vae"})
CLIP = frozenset({"clip_skip", "weights"})
CONTROLLED = frozenset({"control", "control_scale", "control_start", "control_end", "guess_mode"})
"""ControlNets, of a bundle that has some."""
REFERRED = frozenset({"ip_adapter_image", "ip_adapter_scale"})
"""An IP-Adapter, of a bundle that has one."""
PADDED = frozenset({"max_sequence_length"})
"""A text encoder whose prompts are padded to a length that is not CLIP's."""
