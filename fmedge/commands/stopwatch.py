"""A session that notes when each of its steps began and ended."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from fmedge_runtimes.session import Array, Binding, Buffer, Session, TensorSpec


@dataclass(frozen=True, slots=True)
class Step:
    """One run of the graph; times are those of time.perf_counter."""

    rows: int
    tokens: int
    """Of each row."""
    start: float
    end: float


class Stopwatch:
    """Passes everything on to a session; the steps that ran are in `steps`, which several sessions may share."""

    def __init__(self, session: Session, steps: list[Step] | None = None) -> None:
        self._session = session
        self.steps: list[Step] = [] if steps is None else steps

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._session.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._session.outputs

    @property
    def window_slack(self) -> bool:
        return self._session.window_slack

    @property
    def captures(self) -> bool:
        return self._session.captures

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> Buffer:
        return self._session.allocate(shape, dtype)

    def copy(self, source: Buffer, target: Buffer, shape: tuple[int, ...] | None = None) -> None:
        self._session.copy(source, target, shape)

    def read(self, buffer: Buffer, start: int = 0, stop: int | None = None) -> Array:
        return self._session.read(buffer, start, stop)

    def free_memory(self) -> int | None:
        return self._session.free_memory()

    def bind(self, feeds: Mapping[str, Buffer], results: Mapping[str, Buffer]) -> Binding:
        return _TimedBinding(self._session.bind(feeds, results), self.steps)

    def run(self, feeds: Mapping[str, Array | Buffer], results: Mapping[str, Array | Buffer]) -> dict[str, Array]:
        return self._session.run(feeds, results)

    def close(self) -> None:
        self._session.close()


@dataclass(frozen=True, slots=True)
class _TimedBinding:
    binding: Binding
    steps: list[Step]

    def run(self, feeds: Mapping[str, Array], results: Mapping[str, Array | Buffer], *, steady: bool = False) -> object:
        start = time.perf_counter()
        returned = self.binding.run(feeds, results, steady=steady)
        rows, tokens = feeds["input_ids"].shape
        self.steps.append(Step(rows, tokens, start, time.perf_counter()))
        return returned
