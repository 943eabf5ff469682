"""How much memory a process can still take, without psutil."""

from __future__ import annotations

from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)
"""Limit and use of the container, in cgroup version 2 and 1."""


def available_bytes() -> int | None:
    """Bytes that can be allocated: the machine's, or the container's if it has less; None where it cannot be told."""
    known = [amount for amount in (_machine(), *(_container(*pair) for pair in CGROUPS)) if amount is not None]
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


def _container(limit: Path, used: Path) -> int | None:
    try:
        most, taken = int(limit.read_text("ascii")), int(used.read_text("ascii"))
    except (OSError, ValueError):
        # No cgroup, or no limit ("max").
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
