"""The progress of a build, and the way to stop one: TensorRT asks its monitor after every step whether to go on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

Report = Callable[[str, int, int], None]
"""Takes the phase, steps done, and steps in all."""


def make_monitor(trt: Any, report: Report, stop: threading.Event) -> Any:  # noqa: ANN401 - the bindings have no types
    """A monitor that reports the innermost phase, and ends the build when `stop` is set.

    TensorRT calls it from threads of its own. Its class can only be made when the bindings are there.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the bindings have no types
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._lock = threading.Lock()
            self._totals: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self._lock:
                self._totals[phase_name] = num_steps
            report(phase_name, 0, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            with self._lock:
                self._totals.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self._lock:
                total = self._totals.get(phase_name, 0)
            report(phase_name, step + 1, total)
            return not stop.is_set()

    return Monitor()
