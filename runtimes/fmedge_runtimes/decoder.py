"""A decoder over the rows of a cache: prefill a row, decode many rows. Token ids in, logits out.

One graph does both, or two that read and write the same cache: one that is fast with few tokens in a step, and one that
is fast with many, for pieces of prompts (docs/quantization.md, "A second graph for prompts").

decoder = Decoder(session, facts)
cache = decoder.new_cache()
logits = decoder.prefill(cache, row=0, tokens=[1, 2, 3])      # [V]
logits = decoder.decode(cache, [7])                           # [1, V]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from fmedge_runtimes.device_logits import DeviceLogits, Summariser
from fmedge_runtimes.errors import BackendError, CacheMemoryError
from fmedge_runtimes.manifest import TextFacts
from fmedge_runtimes.row_cache import RowCache
from fmedge_runtimes.session import Array, Buffer, Session

Tokens = Sequence[int] | npt.NDArray[np.integer]

PREFILL_CHUNK = 256
"""Tokens of a prompt that go through the graph at once: longer pieces are no faster on a CPU, and take memory."""
PREFILL_LEAST = 8
"""Tokens of a piece of a prompt from which on the graph for prompts is the faster one: docs/quantization.md."""
BATCH_LEAST = 12
"""Rows of a step from which on it is so much faster that it may be worth it that they influence each other."""


class Decoder:
    """Runs the steps of a decoder; what is kept between them is in the cache."""

    def __init__(
        self,
        session: Session,
        facts: TextFacts,
        candidates: Session | None = None,
        prefill: Session | None = None,
        *,
        batches: bool = False,
    ) -> None:
        """`candidates`: a graph that summarises logits on the same device, where `decode` leaves them then.

        `prefill`: a graph with the same inputs and outputs for pieces of prompts; with `batches` for steps of many
        rows, too, which influence each other there.
        """
        self.session = session
        self.prefill_session = prefill
        self._batches = batches
        self.facts = facts
        self._summarise = None if candidates is None else Summariser(candidates)
        self._logits: Buffer | None = None
        self._inputs = {spec.name for spec in session.inputs}
        self._one_token = any(spec.name == "input_ids" and spec.shape[1:] == (1,) for spec in session.inputs)
        largest = next((spec.largest for spec in session.inputs if spec.name == "input_ids"), None)
        self.most_rows: int | None = None if largest is None else largest[0]
        """Rows that a step may have; None: any number."""
        self._most_tokens: int | None = None if largest is None else largest[1]
        self._logits_dtype = next(spec.dtype for spec in session.outputs if spec.name == "logits")

    @property
    def chunk(self) -> int:
        """Tokens of a prompt that go through the graph at once."""
        return PREFILL_CHUNK if self._most_tokens is None else min(PREFILL_CHUNK, self._most_tokens)

    def new_cache(self, budget: int | None = None) -> RowCache:
        """An empty cache for this graph, of `budget` bytes at most."""
        return RowCache(self.session, self.facts, budget)

    def prefill(self, cache: RowCache, row: int, tokens: Sequence[int]) -> npt.NDArray[np.floating]:
        """Cache a prompt in a row of its own, chunk by chunk, and return its last logits [V].

        No other row is padded for it. Raises CacheMemoryError.
        """
        cache.reserve(row + 1, len(tokens) + 1)
        cache.start(row)
        logits: npt.NDArray[np.floating] = np.empty((0,), np.float32)  # [V] once a chunk has run
        try:
            for start in range(0, len(tokens), self.chunk):
                logits = self.extend(cache, row, tokens[start : start + self.chunk])
        except BaseException:
            cache.cut(row, 0)
            raise
        return logits

    def extend(self, cache: RowCache, row: int, tokens: Tokens) -> npt.NDArray[np.floating]:
        """Append tokens to one row, which has room for them, and return the logits [V] behind the last one."""
        ids = np.asarray(tokens, np.int64)[None]  # [1, S]
        wanted = np.array([ids.shape[1] - 1], np.int64)
        last: npt.NDArray[np.floating] = self._run(cache, row, ids, wanted, self._for_text(ids.shape[1]))[0]
        return last

    def verify(self, cache: RowCache, row: int, tokens: Tokens) -> npt.NDArray[np.floating]:
        """Append tokens to one row, which has room for them, and return the logits [S, V] behind each of them.

        They are what `decode` would have given one by one, so the graph is the one that decodes.
        """
        ids = np.asarray(tokens, np.int64)[None]  # [1, S]
        return self._run(cache, row, ids, np.arange(ids.shape[1], dtype=np.int64), self.session)

    def _read(self, cache: RowCache, row: int, tokens: Tokens) -> npt.NDArray[np.floating]:
        """The same for a text that is given, which goes through as a prompt does."""
        ids = np.asarray(tokens, np.int64)[None]  # [1, S]
        return self._run(cache, row, ids, np.arange(ids.shape[1], dtype=np.int64), self._for_text(ids.shape[1]))

    def _for_text(self, tokens: int) -> Session:
        """The graph for a piece of a prompt."""
        return self.session if self.prefill_session is None or tokens < PREFILL_LEAST else self.prefill_session

    def decode(self, cache: RowCache, tokens: Sequence[int]) -> npt.NDArray[np.floating]:
        """Append a token to each of the first R rows and return the logits [R, V] behind them.

        Raises CacheMemoryError.
        """
        rows = len(tokens)
        cache.reserve(rows, int(cache.lengths[:rows].max()) + 1)
        ids = np.asarray(tokens, np.int64)[:, None]  # [R, 1]
        session = self._for_text(rows) if self._batches and rows >= BATCH_LEAST else self.session
        return self._run(cache, 0, ids, np.arange(rows, dtype=np.int64), session)

    def decode_in_place(self, cache: RowCache, tokens: Sequence[int]) -> npt.NDArray[np.floating] | DeviceLogits:
        """The same; where there is a graph to summarise them, the logits stay on the device until the next call."""
        if self._summarise is None:
            return self.decode(cache, tokens)
        rows = len(tokens)
        cache.reserve(rows, int(cache.lengths[:rows].max()) + 1)
        ids = np.asarray(tokens, np.int64)[:, None]  # [R, 1]
        buffer = self._buffer(cache, rows)
        self._step(cache, 0, ids, np.arange(rows, dtype=np.int64), buffer.rows(0, rows), self.session)
        return DeviceLogits(self.session, buffer, rows, self._summarise)

    def _buffer(self, cache: RowCache, rows: int) -> Buffer:
        """Memory on the device for the logits of so many rows, and of all that the cache has."""
        if self._logits is None or self._logits.shape[0] < rows:
            shape = (max(rows, cache.rows), self.facts.vocabulary)
            try:
                self._logits = self.session.allocate(shape, np.dtype(self._logits_dtype))
            except MemoryError as error:
                raise CacheMemoryError(f"there is no memory for the logits of {shape[0]} rows.") from error
        return self._logits

    def close(self) -> None:
        """Give the memory of the sessions back."""
        self._logits = None
        if self._summarise is not None:
            self._summarise.close()
        if self.prefill_session is not None:
            self.prefill_session.close()
        self.session.close()

    def score(self, cache: RowCache, tokens: Sequence[int]) -> npt.NDArray[np.floating]:
        """The logits [S, V] at every position of a text, in a cache that is empty before and after."""
        cache.reserve(1, len(tokens))
        cache.start(0)
        try:
            chunks = (tokens[start : start + self.chunk] for start in range(0, len(tokens), self.chunk))
            return np.concatenate([self._read(cache, 0, chunk) for chunk in chunks])  # [S, V]
        finally:
            cache.clear()

    def predict(self, cache: RowCache, tokens: Sequence[int], first: int) -> Iterator[npt.NDArray[np.floating]]:
        """The logits [P, V] that predict tokens[first:], chunk by chunk, in a cache that is empty before and after.

        What stands before tokens[first - 1] is context, for which no logits are made; `first` is at least 1.
        """
        cache.reserve(1, len(tokens))
        cache.start(0)
        context, end = first - 1, len(tokens) - 1
        try:
            for start in range(0, context, PREFILL_CHUNK):
                self.extend(cache, 0, tokens[start : min(start + PREFILL_CHUNK, context)])
            for start in range(context, end, PREFILL_CHUNK):
                yield self._read(cache, 0, tokens[start : min(start + PREFILL_CHUNK, end)])
        finally:
            cache.clear()

    def _run(
        self,
        cache: RowCache,
        first: int,
        ids: npt.NDArray[np.int64],
        wanted: npt.NDArray[np.int64],
        session: Session,
    ) -> npt.NDArray[np.floating]:
        """One step for the rows first : first + R with token ids [R, S]; logits [N, V] of the wanted of R * S."""
        rows, length = ids.shape
        if self.most_rows is not None and rows > self.most_rows:
            raise BackendError(f"a step for {rows} rows, and the engine was built for {self.most_rows} (--rows).")
        if self._one_token and length > 1:
            # Several tokens are one row's, and this graph takes them one by one.
            asked = (wanted[wanted == token] * 0 for token in range(length))
            return np.concatenate(
                [self._run(cache, first, ids[:, [token]], part, session) for token, part in enumerate(asked)]
            )
        logits: npt.NDArray[np.floating] = np.empty((len(wanted), self.facts.vocabulary), self._logits_dtype)  # [N, V]
        self._step(cache, first, ids, wanted, logits, session)
        return logits

    def _step(
        self,
        cache: RowCache,
        first: int,
        ids: npt.NDArray[np.int64],
        wanted: npt.NDArray[np.int64],
        logits: npt.NDArray[np.floating] | Buffer,
        session: Session,
    ) -> None:
        """One run of a graph for the rows first : first + R with token ids [R, S], into logits [N, V]."""
        rows, length = ids.shape
        past = cache.lengths[first : first + rows]  # [R]
        # Any length from the longest row's to the capacity is right; one that stays lets a device record the step.
        steady = length == 1 and cache.repeatable and session.captures
        total = cache.capacity if steady else int(past.max()) + length
        step: dict[str, Array] = {
            "input_ids": ids,
            "position_ids": past[:, None].astype(np.int64) + np.arange(length),  # [R, S]
            "logits_indices": wanted,
            "seqlens_k": past + np.int32(length - 1),  # [R]
            "total_sequence_length": np.array(total, np.int32),
            "write_indices": past.astype(np.int64),  # [R]
        }
        feeds = {name: array for name, array in step.items() if name in self._inputs}
        cache.bound(first, first + rows, session).run(feeds, {"logits": logits}, steady=steady)
        cache.append(first, ids)
