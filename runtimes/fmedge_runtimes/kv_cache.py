"""The keys and values of all live rows: one buffer [rows, K, capacity, D] for each layer's keys and values.

The graph updates the buffers in place. Capacity grows when a row needs it and never starts at the model's maximum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress

import numpy as np

from fmedge_runtimes.bundle import CacheFacts
from fmedge_runtimes.errors import CacheMemoryError
from fmedge_runtimes.session import Buffer, Session

STEP = 64
"""Capacities are multiples of this."""
GROWTH = 1.5
"""A full cache grows by this factor where memory allows, so that growth is rare."""
RESERVE = 64 << 20
"""Bytes that stay free for the graph's own working memory."""


class KVCache:
    """The cache of one generation. Rows 0 .. live - 1 are in use; `lengths[row]` tokens of a row are cached."""

    def __init__(self, session: Session, caches: Sequence[CacheFacts], dtype: str, context: int) -> None:
        self._session = session
        self._facts = tuple(caches)
        self._dtype: np.dtype[np.generic] = np.dtype(dtype)
        self._context = context
        self._buffers: dict[str, Buffer] = {}
        # Steps ask for the same rows again and again; a view of them is good until a buffer is replaced.
        self._views: dict[tuple[int, int], tuple[dict[str, Buffer], dict[str, Buffer]]] = {}
        self.rows = 0
        self.capacity = 0
        self.lengths: list[int] = []

    def nbytes(self, rows: int, capacity: int) -> int:
        """Size of all buffers for so many rows of so many tokens."""
        per_token = sum(facts.kv_heads * (facts.key_dim + facts.value_dim) for facts in self._facts)
        per_token *= self._dtype.itemsize
        return rows * capacity * per_token

    def reserve(self, rows: int, tokens: int) -> None:
        """Make room for so many rows of at least so many tokens, keeping what is cached.

        Raises CacheMemoryError when memory does not suffice; what is cached is then as it was.
        """
        if rows <= self.rows and tokens <= self.capacity:
            return
        live = len(self.lengths)
        least = self._rounded(max(tokens, self.capacity))
        generous = self._rounded(int(self.capacity * GROWTH)) if tokens > self.capacity else least
        size = (max(rows, self.rows), max(generous, least))
        # The last resort gives up what earlier requests left: rows without tokens, and length that no row uses.
        smaller = (max(rows, live), self._rounded(max(tokens, self.capacity if live else 0)))
        if size != smaller:
            with suppress(CacheMemoryError):
                self._resize(*size)
                return
        self._resize(*smaller)

    def _rounded(self, tokens: int) -> int:
        return min(self._context, -(-tokens // STEP) * STEP)

    def _check_room(self, rows: int, capacity: int) -> None:
        free = self._session.free_memory()
        if free is None:
            return
        need = RESERVE + self.nbytes(rows, capacity) - self.nbytes(self.rows, self.capacity)
        if self.lengths:
            # Layers are resized one after the other, so the old and the new form of one of them exist at once.
            largest = max(facts.kv_heads * max(facts.key_dim, facts.value_dim) for facts in self._facts)
            need = max(need, RESERVE) + rows * capacity * largest * self._dtype.itemsize
        if need > free:
            raise CacheMemoryError(
                f"the KV cache for {rows} rows of {capacity} tokens needs {need >> 20} MiB more and {free >> 20} MiB "
                "are free; serve fewer rows at once (max_batch), shorten the prompt or lower max_new_tokens."
            )

    def _resize(self, rows: int, capacity: int) -> None:
        self._check_room(rows, capacity)
        if not self.lengths:
            # Nothing to keep: the old buffers go first.
            self._buffers.clear()
            self._views.clear()
            self.rows = self.capacity = 0
        resized: list[str] = []
        try:
            for name, shape in self._shapes(rows, capacity):
                self._replace(name, shape)
                resized.append(name)
        except MemoryError as error:
            self._undo(resized)
            raise CacheMemoryError(
                f"the KV cache for {rows} rows of {capacity} tokens ({self.nbytes(rows, capacity) >> 20} MiB) "
                "does not fit in memory; serve fewer rows at once (max_batch)."
            ) from error
        self.rows, self.capacity = rows, capacity

    def _shapes(self, rows: int, capacity: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        for facts in self._facts:
            for part, size in (("key", facts.key_dim), ("value", facts.value_dim)):
                length = facts.window if facts.rolling and facts.window else capacity
                yield f"{facts.layer}.{part}", (rows, facts.kv_heads, length, size)  # [R, K, C, D]

    def _replace(self, name: str, shape: tuple[int, ...]) -> None:
        buffer = self._session.allocate(shape, self._dtype)
        if name in self._buffers:
            self._session.copy(self._buffers[name], buffer)
        self._buffers[name] = buffer
        self._views.clear()

    def _undo(self, resized: Sequence[str]) -> None:
        """Bring the buffers that were resized back to the shape of the others."""
        if not self.rows:
            self._buffers.clear()
            self._views.clear()
            return
        shapes = dict(self._shapes(self.rows, self.capacity))
        for name in resized:
            with suppress(MemoryError):
                self._replace(name, shapes[name])
        # The graph takes each layer's buffer as long as it is, so a longer one does no harm.
        self.rows = min(buffer.shape[0] for buffer in self._buffers.values())

    def view(self, start: int, stop: int) -> tuple[dict[str, Buffer], dict[str, Buffer]]:
        """Inputs and outputs of the graph for the rows start:stop: the same buffers as both."""
        if (start, stop) not in self._views:
            rows = {name: buffer.rows(start, stop) for name, buffer in self._buffers.items()}
            self._views[start, stop] = (
                {f"past_key_values.{name}": buffer for name, buffer in rows.items()},
                {f"present.{name}": buffer for name, buffer in rows.items()},
            )
        return self._views[start, stop]

    def copy_row(self, source: int, target: int) -> None:
        """Copy a row over another one."""
        for buffer in self._buffers.values():
            self._session.copy(buffer.rows(source, source + 1), buffer.rows(target, target + 1))

    def drop_row(self, row: int) -> None:
        """Forget a row; the last live row takes its place."""
        last = len(self.lengths) - 1
        if row != last:
            self.copy_row(last, row)
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()

    def clear(self) -> None:
        """Forget all rows, keep the memory."""
        self.lengths.clear()
