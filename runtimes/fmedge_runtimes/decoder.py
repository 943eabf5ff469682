"""One decoder graph over one KV cache: prefill a row, decode all rows. Token ids in, logits out.

decoder = Decoder(session, facts)
cache = decoder.new_cache()
logits = decoder.prefill(cache, row=0, tokens=[1, 2, 3])      # [V]
logits = decoder.decode(cache, [7])                           # [1, V]
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fmedge_runtimes.bundle import TextFacts
from fmedge_runtimes.kv_cache import KVCache
from fmedge_runtimes.session import Array, Session

PREFILL_CHUNK = 512
"""Tokens of a prompt that go through the graph at once: enough for full speed, little working memory."""


class Decoder:
    """Runs the steps of a decoder; the state of a generation is in its cache."""

    def __init__(self, session: Session, facts: TextFacts) -> None:
        self.session = session
        self.facts = facts
        self._inputs = {spec.name for spec in session.inputs}
        self._logits_dtype = next(spec.dtype for spec in session.outputs if spec.name == "logits")

    def new_cache(self) -> KVCache:
        """An empty cache for this graph."""
        return KVCache(self.session, self.facts.caches, self.facts.cache_dtype, self.facts.context)

    def prefill(self, cache: KVCache, row: int, tokens: Sequence[int]) -> npt.NDArray[np.floating]:
        """Cache a prompt in an empty row of its own, chunk by chunk, and return its last logits [V].

        `row` is the next one: len(cache.lengths). No other row is padded for it. Raises CacheMemoryError.
        """
        cache.reserve(row + 1, len(tokens) + 1)
        cache.lengths.append(0)
        logits: npt.NDArray[np.floating] = np.empty(
            (0, self.facts.vocabulary), np.float32
        )  # [1, V] once a chunk has run
        try:
            for start in range(0, len(tokens), PREFILL_CHUNK):
                chunk = tokens[start : start + PREFILL_CHUNK]
                ids = np.asarray(chunk, np.int64)[None]  # [1, S]
                logits = self._run(cache, row, ids, np.array([len(chunk) - 1], np.int64))
        except BaseException:
            cache.lengths.pop()
            raise
        last: npt.NDArray[np.floating] = logits[0]
        return last

    def decode(self, cache: KVCache, tokens: Sequence[int]) -> npt.NDArray[np.floating]:
        """Append a token to each live row and return the logits [R, V] behind them. Raises CacheMemoryError."""
        cache.reserve(len(tokens), max(cache.lengths) + 1)
        ids = np.asarray(tokens, np.int64)[:, None]  # [R, 1]
        return self._run(cache, 0, ids, np.arange(len(tokens), dtype=np.int64))

    def score(self, cache: KVCache, tokens: Sequence[int]) -> npt.NDArray[np.floating]:
        """The logits [S, V] at every position of a text, in a cache that is empty before and after."""
        cache.reserve(1, len(tokens))
        cache.lengths.append(0)
        parts = []
        try:
            for start in range(0, len(tokens), PREFILL_CHUNK):
                ids = np.asarray(tokens[start : start + PREFILL_CHUNK], np.int64)[None]  # [1, S]
                parts.append(self._run(cache, 0, ids, np.arange(ids.shape[1], dtype=np.int64)))
        finally:
            cache.clear()
        return np.concatenate(parts)  # [S, V]

    def _run(
        self, cache: KVCache, first: int, ids: npt.NDArray[np.int64], wanted: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.floating]:
        """One step for the rows first : first + R with token ids [R, S]; logits [N, V] of the wanted of R * S."""
        rows, length = ids.shape
        stop = first + rows
        past = np.array(cache.lengths[first:stop], np.int32)  # [R]
        step: dict[str, Array] = {
            "input_ids": ids,
            "position_ids": past[:, None].astype(np.int64) + np.arange(length),  # [R, S]
            "logits_indices": wanted,
            "seqlens_k": past + np.int32(length - 1),  # [R]
            "total_sequence_length": np.array(int(past.max()) + length, np.int32),
        }
        feeds, presents = cache.view(first, stop)
        logits: npt.NDArray[np.floating] = np.empty((len(wanted), self.facts.vocabulary), self._logits_dtype)  # [N, V]
        arrays = {name: array for name, array in step.items() if name in self._inputs}
        self.session.run({**arrays, **feeds}, {"logits": logits, **presents})
        for row in range(first, stop):
            cache.lengths[row] += length
        return logits
