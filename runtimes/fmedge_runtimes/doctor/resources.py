"""What the machine can spare: memory, swap, the power mode, and whether this is a container."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fmedge_runtimes.doctor.file_tree import FileTree

POWER_STATUS = "/var/lib/nvpmodel/status"
POWER_MODES = "/etc/nvpmodel.conf"
GOVERNOR = "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"
CONTAINER_MARKS = ("/.dockerenv", "/run/.containerenv", "/var/run/secrets/kubernetes.io")
CONTAINER_GROUPS = re.compile(r"docker|kubepods|containerd|libpod|lxc")


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
    found = re.search(rf"^{name}:\s+(\d{{1,15}}) kB", tree.text("/proc/meminfo") or "", re.MULTILINE | re.ASCII)
    return int(found.group(1)) * 1024 if found else None


def find_swap(tree: FileTree) -> Swap | None:
    """What /proc/swaps lists; None where there is no such file."""
    text = tree.text("/proc/swaps")
    if text is None:
        return None
    disk = zram = 0
    for line in text.splitlines()[1:]:
        fields = line.split()
        if len(fields) >= 3 and re.fullmatch(r"[0-9]{1,15}", fields[2]):
            size = int(fields[2]) * 1024
            zram += size if "zram" in fields[0] else 0
            disk += 0 if "zram" in fields[0] else size
    return Swap(disk, zram)


@dataclass(frozen=True, slots=True)
class Power:
    """A Jetson's power mode, and the one that limits nothing."""

    mode: str
    """Its name, or its number where it has none."""
    fastest: tuple[str, str] | None
    """Number and name of the mode without limits (MAXN, MAXN_SUPER); None if this is it, or there is none."""


def find_power(tree: FileTree) -> Power | None:
    """The power mode; None where there is none. The number of the fastest one differs from board to board."""
    modes = tree.text(POWER_MODES) or ""
    status = re.search(r"pmode:\s*0*(\d{1,4})", tree.text(POWER_STATUS) or "", re.ASCII)
    # Nobody has chosen a mode yet: then it is the one that the board starts with.
    status = status or re.search(r"<\s*PM_CONFIG\s+DEFAULT=0*(\d{1,4})", modes, re.ASCII)
    if status is None:
        return None
    names = dict(re.findall(r"<\s*POWER_MODEL\s+ID=0*(\d{1,4})\s+NAME=(\S+?)\s*>", modes, re.ASCII))
    number = status.group(1)
    fastest = max(((key, name) for key, name in names.items() if name.startswith("MAXN")), key=_super, default=None)
    return Power(names.get(number, f"mode {number}"), None if fastest and fastest[0] == number else fastest)


def _super(mode: tuple[str, str]) -> bool:
    return "SUPER" in mode[1]


def governor(tree: FileTree) -> str | None:
    """How the clock of the processor is chosen."""
    return tree.text(GOVERNOR)


def in_container(tree: FileTree) -> bool:
    """Whether this looks like a container."""
    groups = tree.text("/proc/1/cgroup") or ""
    return any(tree.exists(mark) for mark in CONTAINER_MARKS) or CONTAINER_GROUPS.search(groups) is not None


def in_wsl(tree: FileTree) -> bool:
    """Whether this is Linux under Windows (WSL 2), where the driver is that of Windows."""
    return "microsoft" in (tree.text("/proc/version") or "").lower()
