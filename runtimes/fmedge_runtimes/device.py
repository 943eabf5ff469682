"""Which processor of the machine: `cpu`, `cuda` (the first GPU) or `cuda:1`."""

from __future__ import annotations

from dataclasses import dataclass

from fmedge_runtimes.errors import BackendError


@dataclass(frozen=True, slots=True)
class Device:
    """A kind of processor, and which of that kind."""

    kind: str
    index: int = 0

    def __str__(self) -> str:
        return f"{self.kind}:{self.index}" if self.index else self.kind


def parse_device(name: str) -> Device:
    """The device of a name such as "cuda:1". Raises BackendError for what is no such name."""
    kind, colon, index = name.partition(":")
    if not kind or (colon and not (index.isascii() and index.isdigit())):
        raise BackendError(f"there is no device {name!r}; write cpu, cuda, or cuda:1 for the second GPU.")
    if kind == "cpu" and colon:
        raise BackendError(f"there is no device {name!r}: all processors of the machine are one device, cpu.")
    return Device(kind, int(index or 0))
