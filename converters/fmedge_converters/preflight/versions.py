"""The versions of TensorRT that rules are known for, and the names by which people ask for them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from fmedge_runtimes.devices import DEVICES
from fmedge_runtimes.errors import RequestError

Number = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Version:
    """A row: a version, and who has it."""

    name: str
    number: Number
    """Major and minor; what a rule compares with."""
    software: str
    """The JetPacks and packages that have it."""
    rtx: bool = False
    """TensorRT-RTX, which counts its versions by itself; `number` is that of the TensorRT whose parser it has."""

    def __str__(self) -> str:
        return f"TensorRT-RTX {self.name.removeprefix('rtx-')}" if self.rtx else f"TensorRT {self.name}"


VERSIONS: Mapping[str, Version] = MappingProxyType(
    {
        version.name: version
        for version in (
            Version("10.3", (10, 3), "JetPack 6.1 and 6.2"),
            Version("10.7", (10, 7), "an update for JetPack 6"),
            Version("10.13", (10, 13), "JetPack 7.0 and 7.1"),
            Version("10.16", (10, 16), "JetPack 7.2, desktops"),
            Version("11", (11, 1), "desktops, JetPack 7.2.2 by a package"),
            Version("rtx-1.7", (11, 1), "GeForce and RTX", rtx=True),
        )
    }
)
TARGETS: Mapping[str, str] = MappingProxyType({"tensorrt": "10.16", "tensorrt-compat": "10.3", "rtx": "rtx-1.7"})
"""The oldest version that fmedge tests a target's graphs for."""
JETPACKS: Mapping[Number, str] = MappingProxyType(
    {(6, 1): "10.3", (6, 2): "10.3", (7, 0): "10.13", (7, 1): "10.13", (7, 2): "10.16"}
)
UNSUPPORTED: Mapping[int, str] = MappingProxyType(
    {
        8: "TensorRT 8 has no strong typing and no INT64; JetPack 6.1 and later have 10.3",
        9: "TensorRT 9 was for data centres; 10.3 is the oldest that fmedge knows",
    }
)


@dataclass(frozen=True, slots=True)
class Asked:
    """What a graph is checked for."""

    version: Version
    capability: Number | None
    """Compute capability of the device, if one was named."""
    name: str
    """As it was asked for."""


def find_version(name: str) -> Asked:
    """The row that is meant by a version (10.3.0, 11.4), a JetPack (jetpack-6.2), a target or a device.

    Raises RequestError for anything else, and for versions that fmedge does not know.
    """
    plain = name.lower().strip()
    if plain in DEVICES:
        device = DEVICES[plain]
        major, _, minor = device.compute_capability.partition(".")
        return Asked(row_of(device.tensorrt), (int(major), int(minor)), name)
    if plain in TARGETS:
        return Asked(VERSIONS[TARGETS[plain]], None, name)
    if plain.startswith("rtx"):
        return Asked(VERSIONS["rtx-1.7"], None, name)
    jetpack = re.fullmatch(r"(?:jetpack|jp)[- ]?(\d+)(?:\.(\d+))?(?:\.\d+)*", plain)
    if jetpack:
        wanted = (
            int(jetpack[1]),
            int(jetpack[2] or max((minor for major, minor in JETPACKS if major == int(jetpack[1])), default=0)),
        )
        if wanted not in JETPACKS:
            known = ", ".join(f"{major}.{minor}" for major, minor in JETPACKS)
            raise RequestError(
                f"there are no rules for JetPack {jetpack[0].lstrip('jetpack- ')}; there are for {known}."
            )
        return Asked(VERSIONS[JETPACKS[wanted]], None, name)
    if re.fullmatch(r"\d+(\.(\d+|x))*", plain):
        return Asked(row_of(plain), None, name)
    raise RequestError(
        f"{name!r} is no target: give {', '.join(TARGETS)}, a version ({', '.join(VERSIONS)}), a JetPack (jetpack-6.2) "
        f"or a device ({', '.join(DEVICES)})."
    )


def _number(text: str) -> Number:
    parts = text.split(".")
    # 11.x and 11 are the latest of their kind.
    minor = parts[1] if len(parts) > 1 else "x"
    return int(parts[0]), 999 if minor == "x" else int(minor)


def row_of(name: str) -> Version:
    """The newest row that is not newer than a version: what it has, this version has, too. Raises RequestError."""
    number = _number(name)
    if number[0] in UNSUPPORTED:
        raise RequestError(f"{name}: {UNSUPPORTED[number[0]]}.")
    rows = [version for version in VERSIONS.values() if not version.rtx]
    older = [version for version in rows if (version.number if version.number[0] < 11 else (11, 0)) <= number]
    if not older:
        raise RequestError(f"{name} is older than TensorRT 10.3, the oldest that fmedge knows.")
    return older[-1]
