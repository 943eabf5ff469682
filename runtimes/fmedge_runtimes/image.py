"""An image model: prompts in, images out, many at once.

    model = load_image("out/bundle")
    for made in model.generate(["a red circle", "a blue square"], Diffusion(steps=8, seed=7)):
        made.save(f"{made.prompt}.png")
    for update in model.stream("a red circle", Diffusion(preview_every=2)):
        show(update.previews)

Requests are served one after the other, from whatever thread they come; each is put into batches. An image depends on
its own prompt, seed and settings alone; docs/images.md says what rounding can change.
"""

from __future__ import annotations

import asyncio
import functools
import secrets
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from fmedge_runtimes.bundle import ImageBundle
from fmedge_runtimes.control_images import asked_controls, controls_of, one_or_each
from fmedge_runtimes.diffusion import MOST_PIXELS, Diffusion
from fmedge_runtimes.engine_limits import EngineLimits
from fmedge_runtimes.errors import FmedgeError, GenerationCancelledError, RequestError
from fmedge_runtimes.generated_image import ControlSettings, GeneratedImage, ImageStats, ImageUpdate, Settings
from fmedge_runtimes.image_plan import plan_image
from fmedge_runtimes.memory import available_bytes
from fmedge_runtimes.parts import Parts
from fmedge_runtimes.picture import image_array, mask_array, open_picture
from fmedge_runtimes.pipelines import family_of
from fmedge_runtimes.pipelines.control import control_nets
from fmedge_runtimes.pipelines.pipeline import EVERY, Job, OpenScheduler, Order, Progress, Rendered, Stage
from fmedge_runtimes.pipelines.reference import has_reference
from fmedge_runtimes.schedulers import read_config

if TYPE_CHECKING:
    from PIL.Image import Image

STRENGTH, STRENGTH_MASKED = 0.8, 1.0
"""Of the trajectory, for an image without and with a mask, if nobody said otherwise."""
DEFAULT = Diffusion()
USUAL_BATCH, USUAL_PIXELS, MOST_USUAL = 4, 4 * 512 * 512, 16
"""Images that are denoised together at most, if nobody said otherwise: more of them where they are small, and calls of
a graph cost more than what they compute. Larger batches are hardly faster."""
FREE_FOR = 1.0
"""Seconds for which it is believed how much memory is free: asking takes as long as a step of a small denoiser."""
WAIT = 0.05
"""Seconds between two looks at whether a request that waits was cancelled."""

Stop = threading.Event


class ImageModel:
    """A pipeline of a bundle; `load_image` makes it. May be called from several threads."""

    def __init__(
        self,
        bundle: ImageBundle,
        parts: Parts,
        *,
        max_batch: int | None = None,
        memory: int | None = None,
        limits: EngineLimits | None = None,
    ) -> None:
        """Reads configs and tokenizers. Raises BundleError, and RequestError for options that cannot be.

        `limits` are those of the parts, if they are engines.
        """
        if max_batch is not None and max_batch < 1:
            raise RequestError(f"max_batch is {max_batch}; it must be at least 1.")
        if max_batch is not None and limits is not None:
            limits.check_batch(max_batch)
        self._limits = limits
        self.bundle = bundle
        self._max_batch, self._memory = max_batch, memory
        self._parts = parts
        family = family_of(parts)
        self._family = family
        self.pipeline = family.open(parts)
        facts = bundle.manifest.image
        self._plan = functools.lru_cache(maxsize=64)(functools.partial(plan_image, bundle, engines=limits is not None))
        self._free: tuple[float, int | None] | None = None
        self._batch(facts.height, facts.width, guided=False)  # refuses a memory in which nothing fits
        self._read_scheduler = functools.cache(read_config)
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._closed = False

    @property
    def ran(self) -> frozenset[str]:
        """Names of the parts that have run so far."""
        return frozenset(self._parts.ran)

    def generate(
        self,
        prompts: str | Sequence[str],
        options: Diffusion = DEFAULT,
        *,
        cancel: Stop | None = None,
        progress: Callable[[ImageUpdate], None] | None = None,
    ) -> list[GeneratedImage]:
        """Make images of prompts, n of each, in the order of the prompts.

        Setting `cancel` from another thread stops it at the next step. Raises RequestError for what cannot be served,
        BackendError when a graph fails or gives no image, GenerationCancelledError.
        """
        made: dict[tuple[int, int], GeneratedImage] = {}
        for update in self.stream(prompts, options, cancel=cancel):
            made.update({(image.prompt_index, image.index): image for image in update.finished})
            if progress is not None:
                progress(update)
        return [made[key] for key in sorted(made)]

    def stream(
        self, prompts: str | Sequence[str], options: Diffusion = DEFAULT, *, cancel: Stop | None = None
    ) -> Generator[ImageUpdate, None, None]:
        """Like generate, but says after every step how far it is, with previews if they are asked for.

        What is wrong with the call is raised at once. Images come as their batch is ready. Close the generator to stop.
        """
        self._check_open()
        order = self._order([prompts] if isinstance(prompts, str) else list(prompts), options)
        return self._serve(order, cancel)

    async def agenerate(self, prompts: str | Sequence[str], options: Diffusion = DEFAULT) -> list[GeneratedImage]:
        """Like generate, for coroutines; one that is cancelled stops its request at the next step."""
        cancel = Stop()
        work = asyncio.create_task(asyncio.to_thread(self.generate, prompts, options, cancel=cancel))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            cancel.set()
            await asyncio.wait([work])
            work.exception()  # seen
            raise

    def close(self) -> None:
        """End what is unfinished at its next step, and give the model's memory back; it cannot be used afterwards."""
        self._closed = True
        self._parts.close()

    def __enter__(self) -> ImageModel:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise RequestError(f"the model of {self.bundle.folder} is closed; load it again.")

    def _order(self, prompts: Sequence[str], options: Diffusion) -> Order:
        """The request with every option filled in. Raises RequestError."""
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise RequestError(f"a prompt is {prompt!r}; it must be a text.")
        options.check_prompts(len(prompts))
        self._check_taken(options)
        facts = self.bundle.manifest.image
        image = None if options.image is None else open_picture(options.image, "Diffusion.image")
        mask = None if options.mask is None else open_picture(options.mask, "Diffusion.mask")
        asked = asked_controls(options, control_nets(self._parts.names), len(prompts), self.bundle.folder)
        multiple, larger = self.pipeline.sizes.multiple, self.pipeline.sizes.enlarges
        # An image (or a ControlNet's) keeps its own size, cut to what is possible, as in diffusers; or is enlarged.
        usual = (facts.height, facts.width) if image is None else (image.height * larger, image.width * larger)
        if image is None and asked:
            usual = (asked[0].images[0].height, asked[0].images[0].width)
        height, width = (
            max(own - own % multiple, multiple) if given is None else int(given)
            for given, own in zip((options.height, options.width), usual, strict=True)
        )
        self._check_size(height, width)
        steps = facts.steps if options.steps is None else int(options.steps)
        strength = options.strength if options.strength is not None else STRENGTH if mask is None else STRENGTH_MASKED
        strength = strength if image is not None and "strength" in self.pipeline.takes else 1.0
        guidance = float(facts.guidance if options.guidance is None else options.guidance)
        if self._limits is not None:
            self._limits.check_size(height, width, options.tiling)
        max_batch, split = self._batch(height, width, guided=guidance > 1)
        if self._limits is not None:
            most = self._limits.most_images(guidance)
            max_batch, split = min(max_batch, max(most, 1)), split or most == 0
        return Order(
            jobs=tuple(self._jobs(prompts, options)),
            options=options,
            steps=steps,
            guidance=guidance,
            height=height,
            width=width,
            image=None if image is None else image_array(image, height // larger, width // larger),
            mask=None if mask is None else mask_array(mask, height, width),
            strength=strength,
            max_batch=max_batch,
            split_guidance=split,
            open_scheduler=OpenScheduler(
                self.bundle.folder,
                options.scheduler,
                steps,
                strength,
                respaced=self._family.respaced and image is not None,
                main=self._family.scheduler,
                read=self._read_scheduler,
            ),
            controls=controls_of(asked, height, width),
            references=self._references(options, len(prompts)),
            adapter_scale=self._adapter_scale(options),
        )

    def _references(self, options: Diffusion, prompts: int) -> tuple[Image, ...]:
        """What the IP-Adapter is shown. Raises RequestError."""
        given = options.ip_adapter_image
        if given is None:
            return ()
        if not has_reference(self._parts):
            raise RequestError(
                f"{self.bundle.folder} has no IP-Adapter to show Diffusion.ip_adapter_image to; export it with "
                "--ip-adapter."
            )
        return one_or_each(given if isinstance(given, tuple) else (given,), prompts, "Diffusion.ip_adapter_image")

    def _adapter_scale(self, options: Diffusion) -> float | None:
        """Of the LoRA that the bundle keeps beside its weights. Raises RequestError if there is none to scale."""
        usual, asked = self.bundle.manifest.image.adapter_scale, options.adapter_scale
        if usual is None and asked is not None:
            raise RequestError(
                f"{self.bundle.folder} has no LoRA that can be scaled, so Diffusion.adapter_scale means nothing to it; "
                "export it with --adapter and --keep-adapter."
            )
        return usual if asked is None else float(asked)

    def _check_taken(self, options: Diffusion) -> None:
        for name in sorted(set(Diffusion.__dataclass_fields__) - EVERY - self.pipeline.takes):
            if getattr(options, name) != getattr(DEFAULT, name):
                raise RequestError(
                    f"Diffusion.{name} is nothing that a {self.bundle.manifest.image.pipeline} knows; leave it out."
                )

    def _check_size(self, height: int, width: int) -> None:
        sizes, facts = self.pipeline.sizes, self.bundle.manifest.image
        if sizes.fixed and (height, width) != (facts.height, facts.width):
            raise RequestError(
                f"{width}x{height} cannot be made; {self.bundle.folder} makes {facts.width}x{facts.height} only."
            )
        if height % sizes.multiple or width % sizes.multiple:
            nearest = [max(round(side / sizes.multiple), 1) * sizes.multiple for side in (width, height)]
            raise RequestError(
                f"{width}x{height} is no size for {self.bundle.folder}: sides must be multiples of {sizes.multiple}; "
                f"the nearest is {nearest[0]}x{nearest[1]}."
            )
        if sizes.most is not None and max(height, width) > sizes.most:
            raise RequestError(f"{width}x{height} is too large for {self.bundle.folder}: sides end at {sizes.most}.")
        if height * width > MOST_PIXELS:
            raise RequestError(f"{width}x{height} has more than {MOST_PIXELS} pixels; make it smaller.")

    def _batch(self, height: int, width: int, *, guided: bool) -> tuple[int, bool]:
        """Images that are denoised together at most, and whether guidance takes two calls.

        No more than usual where memory is plenty: results must not depend on what else runs on the machine, as long as
        they need not. Raises RequestError if an amount of memory was given in which not even one image fits.
        """
        small = min(max(USUAL_PIXELS // (height * width), USUAL_BATCH), MOST_USUAL)
        wished = small if self._max_batch is None else self._max_batch
        # Engines have their memory, however many rows of it are used.
        if (self._max_batch is not None or self._limits is not None) and self._memory is None:
            return wished, False
        mode, memory = self._parts.mode, self._memory
        one = self._plan(height=height, width=width, guided=False)
        if memory is None:
            free = self._free_memory()
            # Weights that are loaded are no longer part of what is free.
            loaded = sum(part.weights for part in one.parts if part.name in self._parts.loaded)
            memory = None if free is None else free + loaded
        elif one.total(mode) > memory:
            raise RequestError(
                f"{width}x{height} takes about {one.total(mode) / 2**20:.0f} MiB, and memory allows "
                f"{memory / 2**20:.0f} MiB; allow more, use the memory mode sequential, or make it smaller."
            )
        for batch in range(wished, 0, -1):
            total = self._plan(height=height, width=width, batch=batch, guided=guided).total(mode)
            if memory is None or total <= memory:
                return batch, False
        # What is free is a guess, and so is the plan: a single image is tried.
        return 1, guided

    def _free_memory(self) -> int | None:
        now = time.monotonic()
        if self._free is None or now - self._free[0] > FREE_FOR:
            self._free = now, available_bytes()
        return self._free[1]

    @staticmethod
    def _jobs(prompts: Sequence[str], options: Diffusion) -> Iterator[Job]:
        for number, prompt in enumerate(prompts):
            seed = options.seed_of(number)
            first = secrets.randbelow(2**32) if seed is None else int(seed)
            for index in range(options.n):
                yield Job(prompt, options.negative_of(number), first + index, number, index)

    def _serve(self, order: Order, cancel: Stop | None) -> Generator[ImageUpdate, None, None]:
        with self._turn(cancel):
            self._parts.standing.clear()
            self._parts.standing.update(order.standing)
            for piece, first in self._pieces(order):
                yield from self._render(piece, first, cancel)

    def _pieces(self, order: Order) -> Iterator[tuple[Order, int]]:
        """Parts of an order that are rendered one after the other, with the number of their first job.

        Where parts are loaded in turn, that is all of it, so that each is loaded once.
        """
        size = max(len(order.jobs), 1) if self._parts.mode == "sequential" else order.max_batch
        for start in range(0, len(order.jobs), size):
            yield replace(order, jobs=order.jobs[start : start + size]), start

    def _render(self, order: Order, first: int, cancel: Stop | None) -> Generator[ImageUpdate, None, None]:
        from PIL import Image

        seconds: dict[Stage, float] = {"encode": 0.0, "denoise": 0.0, "decode": 0.0}
        render = self.pipeline.render(order)
        clock = time.perf_counter()
        last = Progress("decode", 0, 0)
        try:
            while True:
                if cancel is not None and cancel.is_set():
                    raise GenerationCancelledError("the request was cancelled.")
                self._check_open()
                last = next(render)
                now = time.perf_counter()
                seconds[last.stage] += now - clock
                images = tuple(first + row for row in last.rows)
                previews = () if last.preview is None else tuple(map(Image.fromarray, last.preview()))
                yield ImageUpdate(last.stage, last.done, last.total, images, previews)
                clock = time.perf_counter()
        except StopIteration as end:
            finished = self._finished(order, end.value, seconds)
            yield ImageUpdate("decode", last.done, last.total, tuple(range(first, first + len(finished))), (), finished)
        except FmedgeError:
            self._check_open()  # a graph that was closed under it
            raise
        finally:
            render.close()

    def _finished(self, order: Order, rendered: Rendered, seconds: dict[Stage, float]) -> tuple[GeneratedImage, ...]:
        from PIL import Image

        options = order.options
        stats = ImageStats(
            rendered.evaluations, len(order.jobs), seconds["encode"], seconds["denoise"], seconds["decode"]
        )
        scheduler = order.open_scheduler.name or order.open_scheduler.config(chosen=False).class_name
        return tuple(
            GeneratedImage(
                Image.fromarray(pixels),
                Settings(
                    job.prompt,
                    job.negative,
                    job.seed,
                    order.steps,
                    order.guidance,
                    order.height,
                    order.width,
                    scheduler,
                    None if order.image is None or "strength" not in self.pipeline.takes else order.strength,
                    order.mask is not None,
                    options.guidance_rescale,
                    options.clip_skip,
                    options.weights,
                    options.max_sequence_length,
                    options.tiling,
                    options.tiny_vae,
                    options.noise_level,
                    self.bundle.manifest.source.id,
                    tuple(ControlSettings(one.net, one.scale, one.start, one.end) for one in order.controls) or None,
                    options.guess_mode,
                    order.adapter_scale,
                    options.ip_adapter_scale if order.references else None,
                ),
                job.prompt_index,
                job.index,
                stats,
                latents,
            )
            for job, pixels, latents in zip(order.jobs, rendered.pixels, rendered.latents, strict=True)
        )

    @contextmanager
    def _turn(self, cancel: Stop | None) -> Iterator[None]:
        """Wait until no other request is being served."""
        me = threading.get_ident()
        if self._owner == me:
            raise RequestError(
                "a stream of this model is unfinished in this thread; read it to its end or close it first."
            )
        while not self._lock.acquire(timeout=WAIT):
            if cancel is not None and cancel.is_set():
                raise GenerationCancelledError("the request was cancelled.")
            self._check_open()
        self._owner = me
        try:
            yield
        finally:
            self._owner = None
            self._lock.release()
