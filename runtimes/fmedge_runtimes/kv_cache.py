"""The keys and values of all live rows: one buffer [rows, K, capacity, D] for each layer's keys and values.

The graph updates the buffers in place. Capacity grows when a row needs it and never starts at the model's maximum.
"""

from __future__ import annotations

from collections.abc import Sequence

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
        self.rows = 0
        self.capacity = 0
        self.lengths: list[int] = []

    def nbytes(self, rows: int, capacity: int) -> int:
        """Size of all buffers for so many rows of so many tokens."""
        per_token = sum(2 * facts.kv_heads * facts.head_dim for facts in self._facts) * self._dtype.itemsize
        return rows * capacity * per_token

    def reserve(self, rows: int, tokens: int) -> None:
        """Make room for so many rows of at least so many tokens, keeping what is cached.

        Raises CacheMemoryError when memory does not suffice; the cache is then as it was.
        """
        if rows <= self.rows and tokens <= self.capacity:
            return
        rows = max(rows, self.rows)
        least = self._rounded(max(tokens, self.capacity))
        generous = self._rounded(int(self.capacity * GROWTH)) if tokens > self.capacity else least
        if self._missing(rows, max(generous, least)) is None:
            self._grow(rows, max(generous, least))
            return
        missing = self._missing(rows, least)
        if missing is None:
            self._grow(rows, least)
            return
        need, free = missing
        raise CacheMemoryError(
            f"the KV cache for {rows} rows of {least} tokens needs {need >> 20} MiB more and {free >> 20} MiB "
            "are free; serve fewer rows at once (max_batch), shorten the prompt or lower max_new_tokens."
        )

    def _rounded(self, tokens: int) -> int:
        return min(self._context, -(-tokens // STEP) * STEP)

    def _missing(self, rows: int, capacity: int) -> tuple[int, int] | None:
        """Bytes needed and free, when the growth does not fit."""
        free = self._session.free_memory()
        if free is None:
            return None
        # Layers grow one after the other, so the old and the new form of one of them exist at once.
        largest = max(facts.kv_heads * facts.head_dim for facts in self._facts)
        need = self.nbytes(rows, capacity) - self.nbytes(self.rows, self.capacity)
        need += rows * capacity * largest * self._dtype.itemsize
        return (need, free) if need + RESERVE > free else None

    def _grow(self, rows: int, capacity: int) -> None:
        for layer, facts in enumerate(self._facts):
            for part in ("key", "value"):
                name = f"{layer}.{part}"
                shape = (rows, facts.kv_heads, capacity, facts.head_dim)  # [R, K, C, D]
                try:
                    buffer = self._session.allocate(shape, self._dtype)
                except MemoryError as error:
                    raise CacheMemoryError(
                        f"the KV cache for {rows} rows of {capacity} tokens ({self.nbytes(rows, capacity) >> 20} MiB) "
                        "does not fit in memory; serve fewer rows at once (max_batch)."
                    ) from error
                if name in self._buffers and self.lengths:
                    self._session.copy(self._buffers[name], buffer)
                self._buffers[name] = buffer
        self.rows, self.capacity = rows, capacity

    def view(self, start: int, stop: int) -> tuple[dict[str, Buffer], dict[str, Buffer]]:
        """Inputs and outputs of the graph for the rows start:stop: the same buffers as both."""
        feeds, results = {}, {}
        for name, buffer in self._buffers.items():
            rows = buffer.rows(start, stop)
            feeds[f"past_key_values.{name}"] = rows
            results[f"present.{name}"] = rows
        return feeds, results

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
