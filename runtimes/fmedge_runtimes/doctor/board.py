"""Which board this is, and which JetPack it has: from the release file of L4T and the device tree.

What a JetPack holds is NVIDIA's release notes'; a line of the table covers the releases that begin like it. Docker
hides the device tree from containers; /sys/devices/soc0 has the same facts there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from fmedge_runtimes.devices import DEVICES
from fmedge_runtimes.doctor.file_tree import FileTree, numbers

RELEASE_FILE = "/etc/nv_tegra_release"
MODEL = "/proc/device-tree/model"
COMPATIBLE = "/proc/device-tree/compatible"
SOC = "/sys/devices/soc0"
CHIPS: Mapping[str, str] = MappingProxyType(
    {"tegra210": "5.3", "tegra186": "6.2", "tegra194": "7.2", "tegra234": "8.7", "tegra264": "11.0"}
)
"""Compute capabilities of the GPUs in Jetsons: TX1 and Nano, TX2, Xavier, Orin, Thor."""
SOC_IDS: Mapping[str, str] = MappingProxyType(
    {"33": "tegra210", "24": "tegra186", "25": "tegra194", "35": "tegra234", "38": "tegra264"}
)
"""/sys/devices/soc0/soc_id is the chip's number, in decimal."""
WITH_DLA = ("tegra194", "tegra234")
"""Chips with a deep learning accelerator, whose compiler TensorRT loads."""


@dataclass(frozen=True, slots=True)
class Release:
    """A release of Jetson Linux, and what comes with it."""

    l4t: str
    jetpack: str
    cuda: str
    tensorrt: str
    python: str
    """The system's, for which its TensorRT has bindings."""


RELEASES = (
    Release("32", "4", "10.2", "8.2.1", "3.6"),
    Release("34", "5.0", "11.4", "8.4.0", "3.8"),
    Release("35.1", "5.0.2", "11.4", "8.4.1", "3.8"),
    Release("35", "5.1", "11.4", "8.5.2", "3.8"),
    Release("36.3", "6.0", "12.2", "8.6.2", "3.10"),
    Release("36.4.0", "6.1", "12.6", "10.3.0", "3.10"),
    Release("36.4.3", "6.2", "12.6", "10.3.0", "3.10"),
    Release("36.4", "6.2.1", "12.6", "10.3.0", "3.10"),
    Release("36.5", "6.2.2", "12.6", "10.3.0", "3.10"),
    Release("38.2", "7.0", "13.0", "10.13.3", "3.12"),
    Release("38.4", "7.1", "13.0", "10.13.3", "3.12"),
    Release("39.2.1", "7.2.1", "13.2", "10.16.2", "3.12"),
    Release("39", "7.2", "13.2", "10.16.2", "3.12"),
)
"""The first line that fits is the release's."""


@dataclass(frozen=True, slots=True)
class Board:
    """A Jetson."""

    model: str
    l4t: str
    release: Release | None
    """None for a release that is not in the table."""
    chip: str | None
    """tegra234; None where it cannot be told."""

    @property
    def capability(self) -> str | None:
        """The compute capability of the GPU in the chip."""
        return None if self.chip is None else CHIPS[self.chip]

    def target(self, memory: int | None) -> str | None:
        """The name by which `fmedge export --target` knows this board with its JetPack; None if it knows none."""
        words = self.model.lower().replace("jetson", "").split()
        jetpack = "" if self.release is None else self.release.jetpack
        fitting = [
            device
            for device in DEVICES.values()
            if all(word in words for word in _kind(device.product)) and jetpack.startswith(_jetpacks(device.jetpack))
        ]
        if memory is not None:
            # What Linux counts is less than the board has, by what the firmware keeps.
            fitting = [device for device in fitting if device.memory >= memory]
        return min(fitting, key=lambda device: device.memory).name if fitting else None


def _kind(product: str) -> list[str]:
    """Jetson Orin Nano 8GB -> orin, nano."""
    words = re.sub(r"\(.*\)", "", product).lower().split()
    return [word for word in words if word != "jetson" and not re.fullmatch(r"\d+gb", word)]


def _jetpacks(text: str) -> tuple[str, ...]:
    """ "7.0 and 7.1" -> 7.0, 7.1."""
    return tuple(re.findall(r"\d+(?:\.\d+)*", text))


def find_board(tree: FileTree) -> Board | None:
    """The board; None on machines that are no Jetson."""
    chip = _chip(tree)
    text = tree.text(RELEASE_FILE)
    if text is None and chip is None:
        return None
    l4t = _l4t(text or "")
    model = tree.text(MODEL) or tree.text(f"{SOC}/machine") or "an unknown board"
    return Board(model=model, l4t=l4t, release=find_release(l4t), chip=chip)


def _chip(tree: FileTree) -> str | None:
    compatible = tree.text(COMPATIBLE) or ""
    named = next((chip for chip in CHIPS if f"nvidia,{chip}" in compatible), None)
    if named is not None or tree.text(f"{SOC}/family") != "Tegra":
        return named
    return SOC_IDS.get(tree.text(f"{SOC}/soc_id") or "")


def _l4t(text: str) -> str:
    """# R36 (release), REVISION: 4.3, GCID: ... -> 36.4.3; empty if it says something else."""
    found = re.search(r"R(\d{1,4}) \(release\), REVISION: (\d{1,4}(?:\.\d{1,4})*)", text, re.ASCII)
    return f"{found.group(1)}.{found.group(2)}" if found else ""


def find_release(l4t: str) -> Release | None:
    """The line of the table for a release."""
    asked = numbers(l4t)
    return next((row for row in RELEASES if asked and asked[: len(numbers(row.l4t))] == numbers(row.l4t)), None)
