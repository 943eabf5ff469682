"""The forms that a part of a pipeline can have, one for each scheme, and which of them is taken.

Where there are several (`--quantize auto`), each is run on this machine: the fastest that computes what its module
computes is taken. A form that is at most TIE slower and more precise comes first, so that noise decides nothing that
matters; runs take turns, so that another program slows all of them down alike.
"""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from fmedge_runtimes.manifest import Evidence
from fmedge_runtimes.memory import available_bytes
from fmedge_runtimes.onnxruntime_session import OnnxRuntimeSession

from fmedge_converters.part_build import BuiltGraph
from fmedge_converters.part_evidence import DIFFERENCES, Compared, random_inputs
from fmedge_converters.parts.part import Call

TIE = 0.05
LEAST_ROUNDS, MOST_ROUNDS, ROUNDS_SECONDS = 3, 9, 20.0
"""Runs of each form: as many as fit into the time, but at least so many."""
LONGEST_RUN = 2.0
"""Seconds: sides are doubled as long as a run takes less than a quarter of that."""
SMALLEST_SIDE, LARGEST_SIDE = 8, 64
"""Of what is run, in latents or pixels. The second is Stable Diffusion's."""
LOADED = 1.5
"""Memory that a loaded graph takes, as a multiple of its file."""


@dataclass(frozen=True, slots=True)
class Form:
    """A part in one scheme."""

    scheme: str
    folder: Path
    """Where its graphs were built, each in a folder of its own."""
    graphs: tuple[BuiltGraph, ...]
    compared: Mapping[str, Compared]
    """By graph; empty if nothing was compared."""
    dtype: str
    """What it computes with."""
    seconds: float | None = None
    """Of one run; None if it was not measured."""

    def precision(self, graph: BuiltGraph) -> tuple[str, str]:
        """By which the tables of tolerances know it."""
        return self.dtype, self.scheme if graph.quantized else "none"

    @property
    def holds(self) -> bool:
        """Whether every graph is within the tolerance of its precision."""
        return all(
            self.compared[graph.name].within(DIFFERENCES[self.precision(graph)])
            for graph in self.graphs
            if graph.name in self.compared
        )

    @property
    def error(self) -> float:
        """Of its worst graph."""
        return max((item.mean for item in self.compared.values()), default=0.0)


@dataclass(slots=True)
class Choice:
    """The forms of a part, and the one that is in the bundle."""

    part: str
    forms: list[Form]
    """As they are to be taken, the best first."""
    measured: tuple[Form, ...] = ()
    """All that were measured, the most precise first."""
    config: Path | None = None
    """A file that every graph's folder gets."""
    chosen: Form = field(init=False)

    def __post_init__(self) -> None:
        self.chosen = self.forms[0]

    @property
    def precise(self) -> int:
        """0 for the least precise of the measured forms, and so on."""
        return [form.scheme for form in reversed(self.measured or self.forms)].index(self.chosen.scheme)

    def install(self, output: Path) -> None:
        """Put the graphs of the chosen form into the bundle."""
        moved = []
        for graph in self.chosen.graphs:
            folder = output / graph.name
            # It may have facts of the part already, which are of no form.
            folder.mkdir(exist_ok=True)
            for file in (self.chosen.folder / graph.name).iterdir():
                file.rename(folder / file.name)
            if self.config is not None:
                shutil.copyfile(self.config, folder / self.config.name)
            written = graph.written
            paths = replace(written, graph=folder / written.graph.name, data=folder / written.data.name)
            moved.append(replace(graph, written=paths))
        self.chosen = replace(self.chosen, graphs=tuple(moved))

    def step_down(self, output: Path) -> bool:
        """Take the best form that is more precise instead; whether there is one."""
        order = [form.scheme for form in self.measured]
        precise = order[: order.index(self.chosen.scheme)] if self.chosen.scheme in order else []
        others = [form for form in self.forms if form.scheme in precise]
        if not others:
            return False
        for graph in self.chosen.graphs:
            graph.written.graph.unlink()
            graph.written.data.unlink(missing_ok=True)
        self.chosen = others[0]
        self.install(output)
        return True


def choose(part: str, forms: Sequence[Form], config: Any, path: Path | None) -> Choice:  # noqa: ANN401 - diffusers'
    """Measure forms, the most precise first, and rank those that hold their tolerance. A single one is not measured.

    Raises BackendError when a graph fails.
    """
    if len(forms) == 1:
        return Choice(part, list(forms), config=path)
    # The most precise one is not left out: what is wrong with it is a reason to stop the export.
    holding = [form for number, form in enumerate(forms) if number == 0 or form.holds]
    seconds = measure([form.graphs for form in holding], _side(config)) if len(holding) > 1 else [None]
    timed = [replace(form, seconds=value) for form, value in zip(holding, seconds, strict=True)]
    rank = ranked([form.seconds or 0.0 for form in timed])
    known = {form.scheme: form for form in timed}
    return Choice(part, [timed[place] for place in rank], tuple(known.get(form.scheme, form) for form in forms), path)


def ranked(seconds: Sequence[float]) -> list[int]:
    """The places in the order in which they are to be taken; the first of those that are about as fast leads."""
    left, order = list(range(len(seconds))), []
    while left:
        fastest = min(seconds[place] for place in left)
        order.append(next(place for place in left if seconds[place] <= fastest * (1 + TIE)))
        left.remove(order[-1])
    return order


def _side(config: Any) -> int:  # noqa: ANN401 - diffusers'
    found = getattr(config, "sample_size", None)
    found = min(found) if isinstance(found, list | tuple) and found else found
    return min(int(found), LARGEST_SIDE) if isinstance(found, int) and found else LARGEST_SIDE


def _sizes(side: int) -> dict[str, int]:
    image = max(side // 2, 1) ** 2
    return {"batch": 2, "height": side, "width": side, "sequence": 77, "image_sequence": image, "steps": 1}


def _open(graph: BuiltGraph) -> OnnxRuntimeSession:
    return OnnxRuntimeSession(graph.written.graph, "cpu", None)


def measure(forms: Sequence[Sequence[BuiltGraph]], side: int) -> list[float]:
    """Seconds of one run of all graphs of each form: medians of runs that take turns, at most `side` long."""
    feeds = _feeds(forms[0], side)
    need = sum(graph.written.weight_bytes for graphs in forms for graph in graphs) * LOADED
    free = available_bytes()
    together = free is None or need < free
    times: list[list[float]] = [[] for _ in forms]
    opened: dict[int, list[OnnxRuntimeSession]] = {}
    begun = time.perf_counter()
    try:
        for number in range(MOST_ROUNDS):
            turn = range(len(forms)) if number % 2 == 0 else reversed(range(len(forms)))
            for place in turn:
                if place not in opened:
                    opened[place] = [_open(graph) for graph in forms[place]]
                    _run(opened[place], feeds)  # memory is laid out
                times[place].append(_run(opened[place], feeds))
                if not together:
                    _close(opened.pop(place))
            if number + 1 >= LEAST_ROUNDS and time.perf_counter() - begun > ROUNDS_SECONDS:
                break
    finally:
        for sessions in opened.values():
            _close(sessions)
    return [statistics.median(each) for each in times]


def _feeds(graphs: Sequence[BuiltGraph], most: int) -> list[Mapping[str, np.ndarray[Any, Any]]]:
    """Random inputs of each graph, as large as runs are short enough."""
    sessions = [_open(graph) for graph in graphs]
    side = min(SMALLEST_SIDE, most)
    try:
        while True:
            feeds = [_inputs(graph.call, side) for graph in graphs]
            if side >= most or _run(sessions, feeds) > LONGEST_RUN / 4:
                return feeds
            side = min(2 * side, most)
    finally:
        _close(sessions)


def _inputs(call: Call, side: int) -> Mapping[str, np.ndarray[Any, Any]]:
    return random_inputs(call, _sizes(side), np.random.default_rng(0))


def _run(sessions: Sequence[OnnxRuntimeSession], feeds: Sequence[Mapping[str, np.ndarray[Any, Any]]]) -> float:
    begun = time.perf_counter()
    for session, inputs in zip(sessions, feeds, strict=True):
        session.run(inputs, {})
    return time.perf_counter() - begun


def _close(sessions: Sequence[OnnxRuntimeSession]) -> None:
    for session in sessions:
        session.close()


def speed_evidence(choices: Sequence[Choice]) -> Evidence:
    """The record of what was measured, and taken."""
    figures: dict[str, float | int | str | bool] = {"threads": os.cpu_count() or 1}
    for choice in choices:
        for form in choice.measured:
            name = f"{choice.part}_{form.scheme}"
            figures[f"{name}_ms"] = "differs too much" if form.seconds is None else form.seconds * 1e3
        if choice.measured:
            figures[choice.part] = choice.chosen.scheme
    what = (
        f"quantization of each part, the fastest on {platform.machine()} where it was exported: one run of 2 rows, "
        f"medians of runs that take turns; of those within {TIE:.0%} the most precise"
    )
    return Evidence(name="speed", what=what, passed=True, figures=figures)
