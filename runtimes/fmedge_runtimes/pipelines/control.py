"""ControlNets at work: networks beside a UNet that see an image and say what the UNet is to add (Zhang et al. 2023,
arXiv 2302.05543).

    guides = guides_of(parts, order)                            # each different image is embedded once
    residuals = guides.batch(unet, nets, rows, steps)           # for one batch
    residuals(feeds, call=0, index=3)                           # further inputs of the UNet in that step

A UNet that was exported with ControlNets takes their residuals in every step; where none is at work, zeros of one row
and one place stand for them, which costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fmedge_runtimes.parts import Part, Parts
from fmedge_runtimes.pipelines.pipeline import Array, Order, Pixels

PART, EMBEDDING = "controlnet", "_embedding"
RESIDUALS = ("down_block_additional_residual.", "mid_block_additional_residual")
"""How the UNet's inputs begin that ControlNets give."""
FAINTEST = -1.0
"""In guess mode, the power of ten by which the first residual is scaled; the last is whole."""


def control_nets(graphs: Iterable[str]) -> tuple[str, ...]:
    """Of the graphs of a bundle its ControlNets, in diffusers' order."""
    found = [name for name in graphs if name.split("_")[0] == PART and not name.endswith(EMBEDDING)]
    return tuple(sorted(found, key=lambda name: int(name.removeprefix(PART).removeprefix("_") or 0)))


@dataclass(frozen=True, slots=True)
class Control:
    """What a ControlNet is asked to do in an order."""

    net: str
    images: tuple[Pixels, ...]
    """[height, width, 3]: one for all prompts, or one for each."""
    scale: float
    """Of its residuals."""
    start: float
    """Share of the steps behind which it begins."""
    end: float
    """Share of the steps behind which it rests."""


@dataclass(frozen=True, slots=True)
class Guide:
    """The same with what it saw."""

    control: Control
    seen: tuple[Array, ...]
    """The embedding of each job's image [C, h, w]."""
    fading: bool
    """Whether its residuals are weaker the earlier they are added."""


@dataclass(frozen=True, slots=True)
class Guides:
    """The ControlNets that are at work in an order."""

    each: tuple[Guide, ...]
    guess: bool
    """Whether only the conditional half of guidance is told."""

    def batch(self, unet: Part, nets: Sequence[Part], rows: Sequence[int], steps: int) -> Residuals:
        """What they give for one batch; `nets` are their parts, in the same order."""
        return Residuals(self, unet, nets, rows, steps)


class Residuals:
    """What a UNet is to add, for one batch. Not for several threads at once."""

    def __init__(self, guides: Guides, unet: Part, nets: Sequence[Part], rows: Sequence[int], steps: int) -> None:
        self._guides, self._nets, self._steps, self._batch = guides, nets, steps, len(rows)
        self._seen = [np.stack([guide.seen[row] for row in rows]) for guide in guides.each]  # [B, C, h, w] each
        self._nothing: dict[str, Array] = {
            # The channels are the only size that is known before.
            name: np.zeros((1, *(size if isinstance(size, int) else 1 for size in spec.shape[1:])), np.float32)
            for name, spec in unet.inputs.items()
            if name.startswith(RESIDUALS)
        }

    def __call__(self, given: Mapping[str, Array], sample: str, call: int, calls: int, index: int) -> dict[str, Array]:
        """The residuals for a call of the UNet, by its inputs' names.

        `given` are its other inputs, `sample` names the latents among them. A step of guidance takes one call, whose
        rows are the negative half and the conditional one, or two `calls`. Raises BackendError.
        """
        rows = len(given[sample])
        halves = rows // self._batch * calls
        told = given
        if self._guides.guess and halves == 2:
            if calls == 2 and call == 0:
                return self._nothing
            if calls == 1:
                told = {name: value[self._batch :] if len(value) == rows else value for name, value in given.items()}
        found: dict[str, Array] = {}
        for guide, net, seen in zip(self._guides.each, self._nets, self._seen, strict=True):
            if self._rests(guide.control, index):
                continue
            outputs = net.run(self._feeds(guide, net, told, sample, seen))
            for name in self._nothing:
                value = net.output(name, outputs)
                if name in found:
                    value += found[name]
                found[name] = value
        if told is not given:
            # What the negative half is to add: nothing.
            found = {name: np.concatenate([np.zeros_like(value), value]) for name, value in found.items()}
        return found or self._nothing

    def _rests(self, control: Control, index: int) -> bool:
        return (
            index / self._steps < control.start or (index + 1) / self._steps > control.end or control.scale == 0
        )  # as diffusers counts

    def _feeds(self, guide: Guide, net: Part, told: Mapping[str, Array], sample: str, seen: Array) -> dict[str, Array]:
        rows = len(told[sample])
        scales = np.full(len(self._nothing), guide.control.scale, np.float32)
        if guide.fading:
            scales *= np.logspace(FAINTEST, 0, len(scales), dtype=np.float32)
        own = {
            # Behind the latents may be channels that only the UNet is shown.
            sample: told[sample][:, : _channels(net, sample)],
            PART + EMBEDDING: np.concatenate([seen] * (rows // len(seen))),
            "conditioning_scale": scales,
        }
        return {name: own[name] if name in own else told[name] for name in net.inputs if name in own or name in told}


def _channels(net: Part, sample: str) -> int | None:
    channels = net.input(sample).shape[1]
    return channels if isinstance(channels, int) else None


def guides_of(parts: Parts, order: Order) -> Guides | None:
    """The ControlNets of a bundle at work for an order, whose images they are shown; None if the bundle has none.

    Raises BackendError.
    """
    if not control_nets(parts.names):
        return None
    guess = order.options.guess_mode
    each = []
    for control in order.controls:
        pools = parts.config(control.net).flag("global_pool_conditions")
        # Residuals without places are for the conditional half, too.
        guess = guess or (pools and control.net == PART)
        seen = _embedded(parts, control)
        jobs = (job.prompt_index if len(seen) > 1 else 0 for job in order.jobs)
        each.append((control, tuple(seen[number] for number in jobs), pools))
    return Guides(tuple(Guide(control, seen, guess and not pools) for control, seen, pools in each), guess)


def _embedded(parts: Parts, control: Control) -> list[Array]:
    with parts.use(control.net + EMBEDDING) as part:
        found: dict[int, Array] = {}
        for image in control.images:
            if id(image) not in found:
                levels = np.moveaxis(image.astype(np.float32) / np.float32(255), -1, 0)[None]  # [1, 3, H, W]
                outputs = part.run({"controlnet_cond": np.ascontiguousarray(levels)})
                found[id(image)] = part.output(PART + EMBEDDING, outputs)[0]
    return [found[id(image)] for image in control.images]
