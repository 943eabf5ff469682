"""How much memory a process can still take, without psutil: what the machine has free, and what its groups allow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
MEMBERSHIP = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")


def available_bytes() -> int | None:
    """Bytes that can be allocated; None where it cannot be told.

    That is what the machine has free, or the least that a control group of this process leaves: its container, its
    service, or one of those above, in cgroup version 2 or 1.
    """
    known = [amount for amount in (_machine(), *(_left(*group) for group in _groups())) if amount is not None]
    return min(known) if known else None


def _machine() -> int | None:
    try:
        lines = MEMINFO.read_text("ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _groups() -> Iterator[tuple[Path, Path]]:
    """The files that hold limit and use of each control group that this process is in, and of those above it."""
    try:
        lines = MEMBERSHIP.read_text("utf-8").splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, limit, used = CGROUPS, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit, used = CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # In a container the path may be the host's: then only the root is there, and that is the container's own.
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            folder = root.joinpath(*parts[:depth])
            yield folder / limit, folder / used


def _left(limit: Path, used: Path) -> int | None:
    try:
        most, taken = int(limit.read_text("ascii")), int(used.read_text("ascii"))
    except (OSError, ValueError):
        # No such group, or no limit ("max").
        return None
    return max(0, most - max(0, taken - _file_pages(used.with_name("memory.stat"))))


def _file_pages(stat: Path) -> int:
    """Bytes of files that were read and may be forgotten at once: use, to the kernel, but free for us."""
    try:
        facts = dict(line.split() for line in stat.read_text("ascii").splitlines())
        # Version 1 counts the groups below under a name of its own.
        return int(facts.get("total_inactive_file", facts.get("inactive_file", "0")))
    except (OSError, ValueError):
        return 0
