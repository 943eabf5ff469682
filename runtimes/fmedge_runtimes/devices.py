"""Devices that bundles are exported for by name: what they can compute, and how much memory is left for a model.

A name with a JetPack behind it is the same board with other software. Facts: NVIDIA's module data sheets and JetPack
release notes; `reserve` is an estimate of what the system takes without a desktop (a board of 8 GB has some 5.2 left).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Device:
    """A row of the table."""

    name: str
    product: str
    compute_capability: str
    memory: int
    """Bytes, of the CPU and the GPU together."""
    reserve: int
    """Bytes that the system keeps."""
    jetpack: str
    tensorrt: str
    """The version that this JetPack has."""
    target: str
    """The row of targets whose graphs that version reads."""
    fp8: bool = False
    """The tensor cores multiply fp8."""

    @property
    def usable(self) -> int:
        """Bytes for weights, caches and working memory."""
        return self.memory - self.reserve


def _orin(name: str, product: str, memory: int, reserve: float = 2.8) -> Device:
    return Device(
        name=name,
        product=product,
        compute_capability="8.7",
        memory=memory * GIB,
        reserve=int(reserve * GIB),
        jetpack="6",
        tensorrt="10.3",
        target="tensorrt-compat",
    )


ORINS = (
    _orin("orin-nano-4gb", "Jetson Orin Nano 4GB", 4, reserve=2.0),
    _orin("orin-nano-8gb", "Jetson Orin Nano 8GB", 8),
    _orin("orin-nx-8gb", "Jetson Orin NX 8GB", 8),
    _orin("orin-nx-16gb", "Jetson Orin NX 16GB", 16),
    _orin("agx-orin-32gb", "Jetson AGX Orin 32GB", 32),
    _orin("agx-orin-64gb", "Jetson AGX Orin 64GB", 64),
)
THOR = Device(
    name="thor",
    product="Jetson AGX Thor (T5000)",
    compute_capability="11.0",
    memory=128 * GIB,
    reserve=int(2.8 * GIB),
    jetpack="7.2",
    tensorrt="10.16",
    target="tensorrt",
    fp8=True,
)


def _on_jetpack_7_2(device: Device) -> Device:
    return replace(device, name=f"{device.name}-jp7.2", jetpack="7.2", tensorrt="10.16", target="tensorrt")


_ROWS = (
    *ORINS,
    *(_on_jetpack_7_2(device) for device in ORINS),
    THOR,
    replace(THOR, name="thor-jp7.0", jetpack="7.0 and 7.1", tensorrt="10.13", target="tensorrt-compat"),
)
DEVICES: Mapping[str, Device] = MappingProxyType({device.name: device for device in _ROWS})
