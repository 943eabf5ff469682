"""What the machine can spare: memory, swap, the power mode, and whether this is a container."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fmedge_runtimes.doctor.file_tree import FileTree

POWER_STATUS = "/var/lib/nvpmodel/status"
POWER_MODES = "/etc/nvpmodel.conf"
GOVERNOR = "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"
CONTAINER_MARKS = ("/.dockerenv", "/run/.containerenv")


@dataclass(frozen=True, slots=True)
class Swap:
    """Bytes of swap on a disk, and in compressed memory."""

    disk: int
    zram: int


def memory_total(tree: FileTree) -> int | None:
    """Bytes of memory that Linux counts."""
    return _meminfo(tree, "MemTotal")


def memory_available(tree: FileTree) -> int | None:
    """Bytes that programs can still take."""
    return _meminfo(tree, "MemAvailable")


def _meminfo(tree: FileTree, name: str) -> int | None:
    found = re.search(rf"^{name}:\s+(\d+) kB", tree.text("/proc/meminfo") or "", re.MULTILINE)
    return int(found.group(1)) * 1024 if found else None


def find_swap(tree: FileTree) -> Swap:
    """What /proc/swaps lists."""
    disk = zram = 0
    for line in (tree.text("/proc/swaps") or "").splitlines()[1:]:
        fields = line.split()
        if len(fields) >= 3 and fields[2].isdecimal():
            size = int(fields[2]) * 1024
            zram += size if "zram" in fields[0] else 0
            disk += 0 if "zram" in fields[0] else size
    return Swap(disk, zram)


def power_mode(tree: FileTree) -> str | None:
    """The name of a Jetson's power mode, or its number; None where there is none."""
    status = re.search(r"pmode:\s*0*(\d+)", tree.text(POWER_STATUS) or "")
    if status is None:
        return None
    number = status.group(1)
    named = re.search(rf"<\s*POWER_MODEL\s+ID=0*{number}\s+NAME=(\S+?)\s*>", tree.text(POWER_MODES) or "")
    return named.group(1) if named else f"mode {number}"


def governor(tree: FileTree) -> str | None:
    """How the clock of the processor is chosen."""
    return tree.text(GOVERNOR)


def in_container(tree: FileTree) -> bool:
    """Whether this looks like a container."""
    return any(tree.exists(mark) for mark in CONTAINER_MARKS)
