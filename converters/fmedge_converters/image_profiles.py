"""The sizes that the engines of a pipeline are built for: of every stage its own, and no more than a device has room
for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from fmedge_runtimes.devices import DEVICES
from fmedge_runtimes.engine_limits import stages_of
from fmedge_runtimes.image_plan import PartPlan, engine_working
from fmedge_runtimes.manifest import ImageFacts, ProfileFacts
from fmedge_runtimes.parts import Config
from fmedge_runtimes.pipelines.control import control_nets

from fmedge_converters.image_device_plan import plan_images, weight_bytes
from fmedge_converters.parts.autoencoders import autoencodes, scale_factor
from fmedge_converters.parts.part import Call
from fmedge_converters.pipeline_source import PipelineSource
from fmedge_converters.profiles import PartSizes, Reach, part_profiles
from fmedge_converters.targets import Target

FOLLOWED: Mapping[str, str] = MappingProxyType({"unet": "unet_2", "unet_2": "unet_3", "decoder": "super_res_first"})
"""Stages of cascades that make images of a size of their own where another stage comes behind them, and that stage."""


@dataclass(frozen=True, slots=True)
class PipelineParts:
    """The modules of a pipeline, without weights, and how they are called."""

    source: PipelineSource
    image: ImageFacts
    target: Target
    modules: Mapping[str, Any]
    calls: Mapping[str, Mapping[str, Call]]
    """By part and graph."""

    def profiles(self, reach: Reach) -> dict[str, tuple[ProfileFacts, ...]]:
        """The profiles of each graph."""
        stages = stages_of(
            {
                name: [item.name for item in call.inputs]
                for graphs in self.calls.values()
                for name, call in graphs.items()
            }
        )
        tile = max((_side(module) for module in self.modules.values() if autoencodes(module)), default=0)
        return {
            name: part_profiles(call, PartSizes(self.image, self._pixels(part, call), tile, stages, reach))
            for part, graphs in self.calls.items()
            for name, call in graphs.items()
        }

    @property
    def _factor(self) -> int:
        """Pixels of a latent's side."""
        return next((scale_factor(module) for module in self.modules.values() if autoencodes(module)), 1)

    def _pixels(self, part: str, call: Call) -> int:
        """Pixels along a side of an image, over those of a part's input."""
        if {item.name for item in call.inputs} in ({"controlnet_cond"}, {"sample"}):  # what encodes an image
            return 1
        if FOLLOWED.get(part) in self.modules:
            return self.image.height // int(self.modules[part].config.sample_size)
        return self._factor

    def reach(self, device_name: str, bits: int, progress: Callable[[str, int, int], None]) -> Reach:
        """How far engines go: as the memory of the device allows, if one is named. `bits` are those of linear layers.

        Raises ExportError if nothing fits.
        """
        device = DEVICES.get(device_name)
        if device is None:
            return Reach()
        size = (self.image.height, self.image.width)
        plan = plan_images(device, size, lambda reach: self._planned(reach, bits))
        progress(f"{device.name} is target {self.target.name} (JetPack {device.jetpack}); {plan}", 0, 0)
        return plan.reach

    def _planned(self, reach: Reach, bits: int) -> list[PartPlan]:
        folders = {part.name: part.folder for part in self.source.parts}
        profiles = self.profiles(reach)
        found = []
        for part, graphs in self.calls.items():
            module, config = self.modules[part], Config(folders[part] / "config.json")
            itemsize = 4 if config.flag("force_upcast") else 2
            # The halves of an autoencoder share nothing, and are about the same.
            weights = weight_bytes(module, 8 * itemsize if autoencodes(module) else bits, itemsize)
            weights //= len(graphs) if autoencodes(module) else 1
            for name in graphs:
                working = engine_working(
                    config, name, profiles[name][0].axes, self.image, self._factor, self.target.name
                )
                found.append(PartPlan(name, weights, working, name in control_nets(graphs), held=True))
        return found


def _side(module: Any) -> int:  # noqa: ANN401 - any autoencoder
    """Pixels along a side of what an autoencoder was trained on, which is that of its tiles."""
    side = getattr(module.config, "sample_size", None) or 0
    return int(max(side) if isinstance(side, list | tuple) else side)
