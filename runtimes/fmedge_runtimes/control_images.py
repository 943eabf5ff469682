"""The images that ControlNets are shown: from what a request gives to what an order says.

asked = asked_controls(options, nets, prompts=2, where=folder)
controls = controls_of(asked, height, width)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from fmedge_runtimes.diffusion import Diffusion
from fmedge_runtimes.errors import RequestError
from fmedge_runtimes.picture import open_picture, pixels
from fmedge_runtimes.pipelines.control import Control

if TYPE_CHECKING:
    from PIL.Image import Image

    from fmedge_runtimes.diffusion import Picture


@dataclass(frozen=True, slots=True)
class AskedControl:
    """A ControlNet and its images, opened."""

    net: str
    images: tuple[Image, ...]
    """One for all prompts, or one for each."""
    scale: float
    start: float
    end: float


def asked_controls(options: Diffusion, nets: Sequence[str], prompts: int, where: Path) -> list[AskedControl]:
    """What each ControlNet of a bundle is to do; without those that are given no image. Raises RequestError."""
    if options.control is None:
        return []
    if not nets:
        raise RequestError(f"{where} has no ControlNet to show Diffusion.control to; export it with --controlnet.")
    scales, starts, ends = (
        _one_each(name, value, len(nets))
        for name, value in (
            ("control_scale", options.control_scale),
            ("control_start", options.control_start),
            ("control_end", options.control_end),
        )
    )
    found = []
    for number, given in enumerate(_for_each_net(options.control, nets)):
        if given is None:
            continue
        images = one_or_each(given if isinstance(given, tuple) else (given,), prompts, "Diffusion.control")
        if starts[number] >= ends[number]:
            raise RequestError(
                f"Diffusion.control_start is {starts[number]:g} and control_end {ends[number]:g}: the ControlNet would "
                "never be at work."
            )
        found.append(AskedControl(nets[number], images, scales[number], starts[number], ends[number]))
    if not found:
        raise RequestError("Diffusion.control has no image; leave it out.")
    return found


def one_or_each(given: Sequence[Picture], prompts: int, what: str) -> tuple[Image, ...]:
    """The images, opened, each file once. Raises RequestError for another number than one or that of the prompts."""
    if len(given) not in (1, prompts):
        raise RequestError(f"{what} has {len(given)} images for {prompts} prompts; give one for all, or one for each.")
    if any(one is None or isinstance(one, tuple) for one in given):
        raise RequestError(f"{what} has a list, or nothing, where an image is wanted.")
    opened: dict[object, Image] = {}
    for picture in given:
        if _key(picture) not in opened:
            opened[_key(picture)] = open_picture(picture, what)
    return tuple(opened[_key(picture)] for picture in given)


def controls_of(asked: Sequence[AskedControl], height: int, width: int) -> tuple[Control, ...]:
    """The same with pixels of the size that is rendered, made once of each image."""
    made = {id(image): image for one in asked for image in one.images}
    arrays = {key: pixels(image, height, width) for key, image in made.items()}
    return tuple(
        Control(one.net, tuple(arrays[id(image)] for image in one.images), one.scale, one.start, one.end)
        for one in asked
    )


def _for_each_net(
    control: Picture | tuple[Picture | tuple[Picture, ...] | None, ...], nets: Sequence[str]
) -> Sequence[Picture | tuple[Picture, ...] | None]:
    if len(nets) == 1:
        if isinstance(control, tuple) and any(one is None or isinstance(one, tuple) for one in control):
            raise RequestError("Diffusion.control is nested, and there is one ControlNet; give an image, or a list.")
        return [control]  # type: ignore[list-item]  # the border checks it
    if not isinstance(control, tuple) or len(control) != len(nets):
        count = len(control) if isinstance(control, tuple) else 1
        raise RequestError(
            f"Diffusion.control has {count} of {len(nets)} images: give a list with one for each ControlNet "
            f"({', '.join(nets)}), in which None lets one rest."
        )
    return control


def _one_each(name: str, value: float | tuple[float, ...], count: int) -> tuple[float, ...]:
    if not isinstance(value, tuple):
        return (value,) * count
    if len(value) != count:
        raise RequestError(
            f"Diffusion.{name} has {len(value)} values for {count} ControlNets; give one for all, or one for each."
        )
    return value


def _key(picture: Picture) -> object:
    return str(picture) if isinstance(picture, str | PathLike) else id(picture)
