"""What the rows of a batch keep between steps: keys and values of their tokens, and the states of recurrent layers.

Every buffer has the rows as its first axis, and the graph updates it in place. There are three kinds:

- keys and values of all tokens [R, K, capacity, D]: the capacity grows when a row needs it and never starts at the
  model's maximum, unless the graph fixes it (TensorRT);
- keys and values of a window [R, K, C, D] ("rolling"): the operator keeps the latest positions, whatever the length;
- states [R, *shape]: what a recurrent layer made of all tokens so far, zeros before the first one.

The cache knows which tokens a row holds, so that a prompt which begins like it can go on from there.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fmedge_runtimes.errors import CacheMemoryError
from fmedge_runtimes.manifest import TextFacts
from fmedge_runtimes.session import Array, Binding, Buffer, Session

STEP = 64
"""Capacities are multiples of this."""
GROWTH = 1.5
"""A full cache grows by this factor where memory allows, so that growth is rare."""
RESERVE = 64 << 20
"""Bytes that stay free for the graph's own working memory."""
BINDINGS = 64
"""Ranges of rows that stay bound to the graph; more are bound again when they are needed."""


@dataclass(frozen=True, slots=True)
class Part:
    """One buffer: an input of the graph, and the output that is the input of the next step."""

    source: str
    target: str
    axes: tuple[int | None, ...]
    """The shape of a row; None is the axis of the positions, which a state has not."""
    dtype: np.dtype[np.generic]
    length: int | None = None
    """Positions of a rolling buffer, or of one whose length the graph fixes; None: as many as the cache's capacity."""
    window: int = 0
    """Positions that a rolling buffer must hold; 0 for others."""
    apart: bool = False
    """The output needs memory of its own, and is copied back after each step."""

    @property
    def grows(self) -> bool:
        """Whether it has positions, as many as the capacity."""
        return None in self.axes and self.length is None

    def row(self, positions: int) -> tuple[int, ...]:
        """The shape of one row with so many positions."""
        return tuple(positions if axis is None else axis for axis in self.axes)

    def shape(self, rows: int, capacity: int) -> tuple[int, ...]:
        """The shape of the buffer."""
        return (rows, *self.row(self.length or capacity))

    def nbytes(self, rows: int, capacity: int) -> int:
        """The size of the buffer, and of its output if that is apart."""
        return math.prod(self.shape(rows, capacity)) * self.dtype.itemsize * (1 + self.apart)

    def held(self, tokens: int) -> int:
        """Positions that the buffer holds of a row of so many tokens."""
        return tokens if self.length is None else resident(tokens, self.length, self.window)


def resident(tokens: int, length: int, window: int) -> int:
    """How many of the latest positions a rolling buffer holds, which lie in order at its beginning.

    When it is full, all that is beyond the window makes room at once: GroupQueryAttention's documentation in ONNX
    Runtime 1.32, "Windowed KV Cache".
    """
    if tokens <= length:
        return tokens
    slack = length - window + 1
    return tokens - slack * -(-(tokens - length) // slack)


def parts_of(facts: TextFacts, *, slack: bool) -> tuple[Part, ...]:
    """The buffers of a decoder; with `slack`, rolling ones are longer than their window, and are shifted less often."""
    found = []
    for cache in facts.caches:
        dtype: np.dtype[np.generic] = np.dtype(cache.quantization or facts.cache_dtype)
        window = cache.window if cache.rolling and cache.window is not None else 0
        length = window + (max(STEP, window // 8) if slack else 0) if window else cache.capacity
        for name, size in (("key", cache.key_dim), ("value", cache.value_dim)):
            source, target = f"past_key_values.{cache.layer}.{name}", f"present.{cache.layer}.{name}"
            axes = (cache.kv_heads, None, size)
            found.append(Part(source, target, axes, dtype, length, window, apart=not cache.in_place))
    for state in facts.states:
        source, target = f"past_states.{state.name}", f"present_states.{state.name}"
        found.append(Part(source, target, state.shape, np.dtype(state.dtype), apart=not state.in_place))
    return tuple(found)


class BoundRows:
    """The graph, bound to some rows of a cache."""

    def __init__(self, session: Session, binding: Binding, apart: Sequence[tuple[Buffer, Buffer]]) -> None:
        self._session = session
        self._binding = binding
        self._apart = apart

    def run(self, feeds: Mapping[str, Array], results: Mapping[str, Array | Buffer], *, steady: bool = False) -> None:
        """Run a step on these rows. Raises BackendError."""
        self._binding.run(feeds, results, steady=steady)
        for made, kept in self._apart:
            self._session.copy(made, kept)


class RowCache:
    """The cache of an engine. Row r holds tokens[r, : lengths[r]]; a row of length 0 is empty."""

    def __init__(self, session: Session, facts: TextFacts, budget: int | None = None) -> None:
        """`budget`: bytes that all buffers may take together; None: what the session has free."""
        self.parts = parts_of(facts, slack=session.window_slack)
        # Keys and values are written where they are already; windows that roll and states in place would move twice.
        self.repeatable = all(part.grows or part.apart for part in self.parts)
        """Whether a step that runs twice leaves what it leaves when it runs once."""
        self._session = session
        self._context = facts.context
        self._budget = budget
        self._buffers: dict[str, Buffer] = {}
        self._zeros: dict[tuple[tuple[int, ...], np.dtype[np.generic]], Buffer] = {}
        self._bound: OrderedDict[tuple[int, int, int], BoundRows] = OrderedDict()
        self.rows = 0
        self.capacity = 0
        self.lengths = np.zeros(0, np.int32)  # [R]
        self.tokens = np.zeros((0, 0), np.int32)  # [R, capacity]

    @property
    def used(self) -> int:
        """Rows up to the last one that is not empty."""
        return int(np.flatnonzero(self.lengths)[-1]) + 1 if self.lengths.any() else 0

    def nbytes(self, rows: int, capacity: int) -> int:
        """Size of all buffers for so many rows of so many tokens."""
        return sum(part.nbytes(rows, capacity) for part in self.parts)

    def room(self) -> int | None:
        """Bytes that the cache could have in all; None where nobody can tell."""
        free = self._session.free_memory()
        if free is not None:
            free = max(0, free - RESERVE) + self.nbytes(self.rows, self.capacity)
        known = [limit for limit in (self._budget, free) if limit is not None]
        return min(known, default=None)

    def reserve(self, rows: int, tokens: int) -> None:
        """Make room for so many rows of at least so many tokens, keeping what is cached.

        Raises CacheMemoryError when memory does not suffice; what is cached is then as it was.
        """
        if rows <= self.rows and tokens <= self.capacity:
            return
        least = self._rounded(max(tokens, self.capacity))
        generous = self._rounded(int(self.capacity * GROWTH)) if tokens > self.capacity else least
        size = (max(rows, self.rows), max(generous, least))
        # The last resort gives up empty rows at the end, and length that no row uses.
        smaller = (max(rows, self.used), self._rounded(max(tokens, int(self.lengths.max(initial=0)))))
        if size != smaller:
            with suppress(CacheMemoryError):
                self._resize(*size)
                return
        self._resize(*smaller)

    def _rounded(self, tokens: int) -> int:
        return min(self._context, -(-tokens // STEP) * STEP)

    def _check_room(self, rows: int, capacity: int) -> None:
        size = self.nbytes(rows, capacity)
        # Buffers are resized one after the other, so the old and the new form of one of them exist at once.
        twice = max((part.nbytes(rows, capacity) for part in self.parts), default=0) if self.used else 0
        what = f"the cache for {rows} rows of {capacity} tokens needs"
        hint = "serve fewer rows at once (max_batch), shorten the prompt or lower max_new_tokens."
        if self._budget is not None and size + twice > self._budget:
            left = self._budget >> 20
            raise CacheMemoryError(f"{what} {size + twice >> 20} MiB and the memory budget leaves {left} MiB; {hint}")
        free = self._session.free_memory()
        need = max(size - self.nbytes(self.rows, self.capacity), 0) + twice + RESERVE
        if free is not None and need > free:
            raise CacheMemoryError(f"{what} {need >> 20} MiB more and {free >> 20} MiB are free; {hint}")

    def _resize(self, rows: int, capacity: int) -> None:
        self._check_room(rows, capacity)
        used = self.used
        if not used:
            # Nothing to keep: the old buffers go first.
            self._drop()
        resized: list[Part] = []
        try:
            for part in self.parts:
                if self._replace(part, rows, capacity):
                    resized.append(part)
        except MemoryError as error:
            self._undo(resized)
            raise CacheMemoryError(
                f"the cache for {rows} rows of {capacity} tokens ({self.nbytes(rows, capacity) >> 20} MiB) "
                "does not fit in memory; serve fewer rows at once (max_batch)."
            ) from error
        lengths, tokens = self.lengths, self.tokens
        self.lengths = np.zeros(rows, np.int32)  # [R]
        self.lengths[:used] = lengths[:used]
        self.tokens = np.zeros((rows, capacity), np.int32)  # [R, capacity]
        shared = min(self.capacity, capacity)
        self.tokens[:used, :shared] = tokens[:used, :shared]
        self.rows, self.capacity = rows, capacity

    def _replace(self, part: Part, rows: int, capacity: int) -> bool:
        """Give a part a buffer of that size with what it held; whether it had another size."""
        old, shape = self._buffers.get(part.source), part.shape(rows, capacity)
        if old is not None and old.shape == shape:
            return False
        # Both, if there are two, before anything is replaced.
        made = [(name, self._session.allocate(shape, part.dtype)) for name in self._names(part)]
        if old is not None and self.used:
            positions = part.length or int(self.lengths.max())
            self._session.copy(old, made[0][1], (self.used, *part.row(positions)))
        self._buffers.update(made)
        self._bound.clear()
        return True

    @staticmethod
    def _names(part: Part) -> tuple[str, ...]:
        return (part.source, part.target) if part.apart else (part.source,)

    def _undo(self, resized: Sequence[Part]) -> None:
        """Bring the buffers that were resized back to the shape of the others."""
        if not self.rows:
            self._drop()
            return
        for part in resized:
            with suppress(MemoryError):
                self._replace(part, self.rows, self.capacity)
        # The graph takes each layer's buffer as long as it is, so one that stayed larger does no harm.
        sizes = [(self._buffers[part.source].shape, part) for part in self.parts]
        self.rows = min(shape[0] for shape, _ in sizes)
        self.capacity = min([self.capacity, *(shape[2] for shape, part in sizes if part.grows)])
        self.lengths, self.tokens = self.lengths[: self.rows], self.tokens[: self.rows, : self.capacity]

    def _drop(self) -> None:
        self._buffers.clear()
        self._bound.clear()
        self.rows = self.capacity = 0
        self.lengths, self.tokens = np.zeros(0, np.int32), np.zeros((0, 0), np.int32)

    def view(self, start: int, stop: int) -> tuple[dict[str, Buffer], dict[str, Buffer]]:
        """Inputs and outputs of the graph for the rows start:stop, most of them the same memory."""
        rows = {name: buffer.rows(start, stop) for name, buffer in self._buffers.items()}
        feeds = {part.source: rows[part.source] for part in self.parts}
        results = {part.target: rows[part.target if part.apart else part.source] for part in self.parts}
        return feeds, results

    def bound(self, start: int, stop: int, session: Session | None = None) -> BoundRows:
        """The graph bound to the rows start:stop; steps ask for the same rows again and again.

        `session`: another graph on the same device that reads and writes the same cache.
        """
        session = self._session if session is None else session
        key = id(session), start, stop  # what is bound keeps the session, so that the number stays its own
        found = self._bound.get(key)
        if found is None:
            feeds, results = self.view(start, stop)
            apart = [(results[part.target], feeds[part.source]) for part in self.parts if part.apart]
            found = self._bound[key] = BoundRows(session, session.bind(feeds, results), apart)
            if len(self._bound) > BINDINGS:
                self._bound.popitem(last=False)
        self._bound.move_to_end(key)
        return found

    def append(self, start: int, tokens: npt.NDArray[np.int64]) -> None:
        """Take note of the tokens [R, S] that a step has put behind the rows from `start` on."""
        rows, length = tokens.shape
        places = self.lengths[start : start + rows, None] + np.arange(length)  # [R, S]
        self.tokens[np.arange(start, start + rows)[:, None], places] = tokens
        self.lengths[start : start + rows] += np.int32(length)

    def common(self, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """How many tokens each row [R] has in common with the beginning of `tokens` [S]."""
        width = min(len(tokens), self.capacity)
        differs = self.tokens[:, :width] != tokens[:width]  # [R, W]
        first = np.where(differs.any(axis=1), differs.argmax(axis=1), width) if width else np.zeros(self.rows)  # [R]
        return np.minimum(first, self.lengths).astype(np.int32)

    def reusable(self, row: int, length: int) -> bool:
        """Whether a row can go on from its first `length` tokens exactly as if it had never held more.

        A state knows the whole row only; a rolling buffer has given up what a shorter row would hold when it was
        shifted in between.
        """
        whole = int(self.lengths[row])
        dropped = whole - length
        return dropped == 0 or all(
            None in part.axes and part.held(length) == part.held(whole) - dropped for part in self.parts
        )

    def can_take_back(self, row: int, tokens: int) -> bool:
        """Whether a row to which so many tokens are appended can be cut to any length from now on."""
        length = int(self.lengths[row])
        return all(
            None in part.axes and part.held(length + tokens) == part.held(length) + tokens for part in self.parts
        )

    def cut(self, row: int, length: int) -> None:
        """Let a row go on from its first tokens; `reusable` says whether it can."""
        self.lengths[row] = length

    def start(self, row: int) -> None:
        """Empty a row, and make it ready for its first token."""
        self.lengths[row] = 0
        for part in self.parts:
            if None not in part.axes:
                key = part.row(0), part.dtype
                if key not in self._zeros:
                    self._zeros[key] = self._session.allocate((1, *key[0]), part.dtype)
                self._session.copy(self._zeros[key], self._row(part, row))

    def copy(self, source: int, target: int, length: int) -> None:
        """Make a row the first `length` tokens of another one, which must be reusable so far."""
        for part in self.parts:
            shape = (1, *part.row(part.held(length)))
            self._session.copy(self._row(part, source), self._row(part, target), shape)
        self.tokens[target, :length] = self.tokens[source, :length]
        self.lengths[target] = length

    def swap(self, first: int, second: int) -> None:
        """Exchange two rows. Raises CacheMemoryError when there is no room for one buffer's row; nothing is moved."""
        lengths = [int(self.lengths[row]) for row in (first, second)]
        try:
            spare = {
                (part.shape(1, self.capacity), part.dtype): self._session.allocate(
                    part.shape(1, self.capacity), part.dtype
                )
                for part in self.parts
            }
        except MemoryError as error:
            raise CacheMemoryError("there is no memory to exchange two rows of the cache.") from error
        for part in self.parts:
            one, other = self._row(part, first), self._row(part, second)
            between = spare[part.shape(1, self.capacity), part.dtype]
            shapes = [(1, *part.row(part.held(length))) for length in lengths]
            self._session.copy(one, between, shapes[0])
            self._session.copy(other, one, shapes[1])
            self._session.copy(between, other, shapes[0])
        for array in (self.tokens, self.lengths):
            array[[first, second]] = array[[second, first]]

    def _row(self, part: Part, row: int) -> Buffer:
        return self._buffers[part.source].rows(row, row + 1)

    def clear(self) -> None:
        """Empty all rows, keep the memory."""
        self.lengths[:] = 0
