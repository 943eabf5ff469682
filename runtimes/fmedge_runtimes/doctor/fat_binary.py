"""Which GPUs a library has code for, read from the CUDA fat binaries inside it; nothing is loaded.

A fat binary is a header (magic, version, header size, size of what follows) and entries, each with its kind (1: PTX,
2: machine code), header size, size and architecture. The layout is what CUDA's own tools write (fatbinary.h of the CUDA
toolkit has the header); an entry's architecture stands 28 bytes into it.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

MAGIC = struct.pack("<I", 0xBA55ED50)
HEADER = struct.Struct("<IHHQ")
ENTRY = struct.Struct("<HHIQ")
ARCHITECTURE = 28
PTX, MACHINE_CODE = 1, 2
KNOWN = range(50, 200)
"""What can be an architecture; anything else is not an entry."""


@dataclass(frozen=True, slots=True)
class Architectures:
    """Compute capabilities times ten: 87 is 8.7."""

    machine_code: frozenset[int]
    ptx: frozenset[int]

    def serve(self, capability: str) -> bool:
        """Whether a GPU of a capability ("8.7") has code: its own, of a lower minor number, or PTX of an older one."""
        major, minor = (int(part) for part in capability.split(".")[:2])
        exact = any(code // 10 == major and code % 10 <= minor for code in self.machine_code)
        return exact or any(code <= major * 10 + minor for code in self.ptx)


def architectures(library: Path) -> Architectures:
    """What a library has code for. Raises OSError, ValueError for an empty file."""
    found: dict[int, set[int]] = {PTX: set(), MACHINE_CODE: set()}
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = content.find(MAGIC)
        while start >= 0:
            for kind, architecture in _entries(content, start):
                found[kind].add(architecture)
            start = content.find(MAGIC, start + len(MAGIC))
    return Architectures(frozenset(found[MACHINE_CODE]), frozenset(found[PTX]))


def _entries(content: mmap.mmap, start: int) -> list[tuple[int, int]]:
    """Kind and architecture of each entry of the fat binary that begins at `start`."""
    found: list[tuple[int, int]] = []
    if start + HEADER.size > len(content):
        return found
    _, _, header, size = HEADER.unpack_from(content, start)
    at, end = start + header, min(start + header + size, len(content))
    while at + ARCHITECTURE + 4 <= end:
        kind, _, header, size = ENTRY.unpack_from(content, at)
        (architecture,) = struct.unpack_from("<I", content, at + ARCHITECTURE)
        if kind not in (PTX, MACHINE_CODE) or architecture not in KNOWN or header < ARCHITECTURE + 4:
            break
        found.append((kind, architecture))
        at += header + size
    return found
