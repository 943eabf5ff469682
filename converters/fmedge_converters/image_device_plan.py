"""How far the engines of an image pipeline go on a device whose memory is known: images together, and their size.

plan = plan_images(DEVICES["orin-nano-8gb"], parts)
plan.reach, str(plan)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from fmedge_runtimes.devices import Device
from fmedge_runtimes.errors import ExportError
from fmedge_runtimes.image_plan import ImagePlan, PartPlan
from fmedge_runtimes.parts import MODES, MemoryMode

from fmedge_converters.device_plan import LIBRARIES
from fmedge_converters.profiles import Reach

REACHES = (
    *(Reach(), Reach(larger=1), Reach(2, larger=1), Reach(1, larger=1)),
    Reach(1, larger=1, tiles=2),
)
"""From far to near: one image of the usual size, decoded in tiles, is the least."""


@dataclass(frozen=True, slots=True)
class ImageDevicePlan:
    """What fits on a device, and how its parts are loaded then."""

    device: Device
    reach: Reach
    mode: MemoryMode
    plan: ImagePlan

    def __str__(self) -> str:
        largest = f"{self.reach.larger * self.plan.width}x{self.reach.larger * self.plan.height}"
        together = f"{self.reach.images} image{'s' * (self.reach.images > 1)} of up to {largest}"
        how = "" if self.reach.tiles == 1 else ", decoded in tiles"
        how += "" if self.mode == MODES[0] else f", parts loaded in turn (--memory-mode {self.mode})"
        weights = sum(part.weights for part in self.plan.parts)
        return (
            f"{self.device.product}: {together}{how}: weights {_gb(weights)}, with working memory and libraries "
            f"{_gb(self.plan.total(self.mode) + LIBRARIES)}, of {_gb(self.device.usable)}"
        )


def plan_images(
    device: Device, size: tuple[int, int], parts_for: Callable[[Reach], Sequence[PartPlan]]
) -> ImageDevicePlan:
    """The farthest reach that fits with all parts loaded, or with parts in turn, or else in tiles.
    `size` is the usual height and width, `parts_for` plans the parts for a reach.

    Raises ExportError when not even one image of the usual size does, with the plan.
    """
    found = None
    # Tiles change an image a little, which other ways to save memory do not.
    ways = (
        (mode, reach) for tiles in (False, True) for mode in MODES for reach in REACHES if (reach.tiles > 1) is tiles
    )
    for mode, reach in ways:
        plan = ImagePlan(*size, reach.images, True, tuple(parts_for(reach)), device.usable - LIBRARIES)
        found = ImageDevicePlan(device, reach, mode, plan)
        if plan.fits(mode):
            return found
    raise ExportError(
        f"the pipeline does not fit on {device.name}: {found}; try --quantize int8 or int4, or another pipeline."
    )


def weight_bytes(module: torch.nn.Module, bits: int, itemsize: int) -> int:
    """Bytes of a module's weights: linear layers in so many bits, the others in floats of that size."""
    linear = sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, torch.nn.Linear))
    every = sum(value.numel() for value in module.parameters())
    return round(linear * min(bits, 8 * itemsize) / 8 + (every - linear) * itemsize)


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
