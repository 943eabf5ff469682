"""Logits that stay on the device that computed them: the host gets a summary of each row, and a row where it must.

logits = DeviceLogits(session, buffer, summariser)     # logits [R, V]
logits.summaries(temperatures)                         # a Summary for each row, kilobytes in all
logits[3]                                              # the logits [V] of a row
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from fmedge_runtimes.errors import BackendError
from fmedge_runtimes.session import Array, Binding, Buffer, Session
from fmedge_runtimes.summary import LogitsRow, Summary


class Summariser:
    """Runs the graph `candidates` over logits in the buffers of another session on the same device."""

    def __init__(self, session: Session) -> None:
        shapes = {spec.name: spec.shape for spec in session.outputs}
        self._session = session
        self._known, self._runs = shapes["top_logits"][1], shapes["weights"][1]
        self._bound: dict[int, tuple[Buffer, Binding]] = {}

    def __call__(self, logits: Buffer, temperatures: npt.NDArray[np.float32]) -> dict[str, Array]:
        """The outputs for logits [R, V] at temperatures [R], by name."""
        rows = len(temperatures)
        buffer, binding = self._bound.get(rows, (None, None))
        if binding is None or buffer is not logits:
            binding = self._session.bind({"logits": logits.rows(0, rows)}, {})
            self._bound[rows] = (logits, binding)
        found: dict[str, Array] = {
            "top_logits": np.empty((rows, int(self._known)), np.float32),  # [R, K]
            "top_ids": np.empty((rows, int(self._known)), np.int32),  # [R, K]
            "weights": np.empty((rows, int(self._runs)), np.float32),  # [R, V / RUN]
            "totals": np.empty((rows,), np.float32),  # [R]
        }
        binding.run({"temperatures": temperatures}, found, steady=True)
        return found

    def close(self) -> None:
        """Give the session's memory back."""
        self._bound.clear()
        self._session.close()


class DeviceLogits:
    """Logits [R, V] in the first rows of a buffer, until the next step writes there."""

    def __init__(self, session: Session, buffer: Buffer, rows: int, summariser: Summariser) -> None:
        self._session = session
        self._buffer = buffer
        self._rows = rows
        self._summariser = summariser
        self._fetched: dict[int, Array] = {}
        self._summaries: list[Summary] = []

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, row: int) -> Array:
        """The logits [V] of a row; fetched once. Raises IndexError."""
        if not 0 <= row < self._rows:
            raise IndexError(row)
        if row not in self._fetched:
            self._fetched[row] = _part(self._session, self._buffer, row, 0, self._buffer.shape[1]).copy()
        return self._fetched[row]

    def summaries(self, temperatures: Sequence[float]) -> list[Summary]:
        """What each row comes to at its temperature, which is above 0. Raises BackendError."""
        if len(temperatures) != self._rows:
            raise BackendError(f"{len(temperatures)} temperatures for {self._rows} rows of logits")
        found = self._summariser(self._buffer, np.array(temperatures, np.float32))
        parts = zip(*(found[name] for name in ("top_ids", "top_logits", "weights", "totals")), strict=True)
        self._summaries = [
            Summary(
                ids, logits, runs, float(total), self._buffer.shape[1], partial(_part, self._session, self._buffer, row)
            )
            for row, (ids, logits, runs, total) in enumerate(parts)
        ]
        return self._summaries

    def row(self, row: int) -> LogitsRow:
        """A row with what it came to, if that was asked for."""
        return LogitsRow(partial(self.__getitem__, row), self._summaries[row] if self._summaries else None)


def _part(session: Session, buffer: Buffer, row: int, start: int, stop: int) -> Array:
    """Some logits of a row. Not a method: summaries that point back would keep the memory until a collection."""
    first = row * buffer.shape[1]
    return session.read(buffer, first + start, first + stop)
