"""What the rest of the machine does while a process is measured: cores in use that are not its own.

with Background() as background:
    subprocess.run(...)
background.cores      # 0.0 on a quiet machine
"""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


class Background:
    """Measures from entry to exit. The measured work must be child processes that end inside."""

    def __init__(self) -> None:
        self.cores = 0.0
        self.seconds = 0.0

    def __enter__(self) -> Background:
        self._started, self._busy, self._own = time.perf_counter(), busy_seconds(), own_seconds()
        return self

    def __exit__(self, *exc: object) -> None:
        self.seconds = time.perf_counter() - self._started
        others = (busy_seconds() - self._busy) - (own_seconds() - self._own)
        self.cores = max(0.0, others / self.seconds)


def busy_seconds() -> float:
    """CPU time of all processes of this machine since its start, from /proc/stat."""
    user, nice, system, _idle, _iowait, irq, softirq, *_ = map(
        int, Path("/proc/stat").read_text("ascii").split("\n", 1)[0].split()[1:]
    )
    return (user + nice + system + irq + softirq) / TICKS


def own_seconds() -> float:
    """CPU time of this process and its ended children."""
    usages = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
