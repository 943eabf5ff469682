"""Who has which row of the cache: generations that decode, those that are being prefilled, and what finished ones left.

A finished generation leaves its row as it is until the row is needed, so that a prompt which begins the same way - a
system prompt, the next turn of a chat, another completion of the same prompt - starts from there. Rows that decode
lie together at the front when they do: `compact` brings them there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fmedge_runtimes.errors import CacheMemoryError
from fmedge_runtimes.generation import Generation
from fmedge_runtimes.row_cache import RowCache

KEPT_SHARE = 4
"""What finished generations left may make the cache grow to one part in so many of the memory."""
NO_TOKENS: npt.NDArray[np.int32] = np.zeros(0, np.int32)


@dataclass(slots=True, eq=False)
class Slot:
    """A row of the cache; what it has cached, the cache knows."""

    row: int
    generation: Generation | None = None
    """Whom it serves; nobody: what is cached may be used again, or is nothing."""
    prompt: npt.NDArray[np.int32] = field(default_factory=lambda: NO_TOKENS)
    """All tokens [S] to prefill."""
    decodes: bool = False
    """The prompt is through."""
    left: int = 0
    """When its last generation left, as a count of such events."""

    @property
    def served(self) -> Generation:
        """Whom it serves, where that is known to be somebody."""
        assert self.generation is not None
        return self.generation


class Slots:
    """The rows of a cache."""

    def __init__(self, cache: RowCache, *, reuse: bool) -> None:
        """`reuse`: whether prompts start from what other rows have cached."""
        self.cache = cache
        self._reuse = reuse
        self._slots: list[Slot] = []
        self._events = 0

    def __iter__(self) -> Iterator[Slot]:
        """Those that serve somebody."""
        return (slot for slot in self._slots if slot.generation is not None)

    def __len__(self) -> int:
        return sum(slot.generation is not None for slot in self._slots)

    @property
    def prefilling(self) -> Slot | None:
        """The slot whose prompt is not through yet."""
        return next((slot for slot in self if not slot.decodes), None)

    def cached(self, slot: Slot) -> int:
        """Tokens that a slot's row holds."""
        return int(self.cache.lengths[slot.row])

    def reserve(self, rows: int, tokens: int, *, wished: int = 0, most: int = 0) -> None:
        """Make room for so many rows of at least so many tokens, at the expense of what finished generations left.

        `wished` rows are taken if there is memory for them. There may be more, up to `most`, to keep what finished
        generations left. Raises CacheMemoryError.
        """
        wished = max(rows, wished)
        tokens = max([tokens, *(len(slot.prompt) + 1 for slot in self)])
        kept = self._kept(tokens, most)
        if max(wished, kept) <= self.cache.rows and tokens <= self.cache.capacity:
            return
        try:
            if kept > wished:
                with suppress(CacheMemoryError):
                    self.cache.reserve(kept, tokens)
            self._reserve(rows, tokens, wished)
        finally:
            # A cache can lose empty rows at its end when it is resized.
            del self._slots[self.cache.rows :]
            self._slots += [Slot(row) for row in range(len(self._slots), self.cache.rows)]

    def _reserve(self, rows: int, tokens: int, wished: int) -> None:
        while True:
            try:
                self.cache.reserve(wished, tokens)
                return
            except CacheMemoryError:
                if self._give_up_row():
                    continue
                if wished == rows:
                    raise
                wished = (wished + rows) // 2

    def _kept(self, tokens: int, most: int) -> int:
        """How many rows there should be for what finished generations left."""
        if not self._reuse or not most or not self.cache.lengths.all():
            return 0
        rows = min(most, self.cache.rows + max(1, self.cache.rows // 2))
        room = self.cache.room()
        fits = room is not None and self.cache.nbytes(rows, max(tokens, self.cache.capacity)) <= room // KEPT_SHARE
        return rows if fits else 0

    def _give_up_row(self) -> bool:
        """Have one row less in use at the end; whether one could be spared."""
        used = self._slots[: self.cache.used]
        spare = self._oldest([slot for slot in used if slot.generation is None])
        if spare is None:
            return False
        self.cache.cut(spare.row, 0)
        if spare is not used[-1]:
            self._move(used[-1], spare)
        return True

    def _oldest(self, free: Sequence[Slot]) -> Slot | None:
        """Of slots that serve nobody one that is empty, or was left the longest time ago."""
        return min(free, key=lambda slot: (self.cached(slot) > 0, slot.left), default=None)

    def place(self, generation: Generation, prompt: npt.NDArray[np.int32], *, whole: bool) -> Slot:
        """Give a generation a row, for which there must be room, with as much of its prompt [S] as is cached somewhere.

        At least its last token is left to compute, unless `whole`.
        """
        source, length = self._longest(prompt, len(prompt) - (not whole))
        target = self._oldest([slot for slot in self._slots if slot.generation is None and slot is not source])
        in_place = source is not None and source.generation is None and 2 * length >= self.cached(source)
        if source is not None and (in_place or target is None):
            target = source
            self.cache.cut(source.row, length)
        elif target is not None:
            self.cache.start(target.row)
            if source is not None:
                self.cache.copy(source.row, target.row, length)
        else:
            raise ValueError("there is no row for another generation")
        target.generation, target.prompt, target.decodes = generation, prompt, False
        return target

    def _longest(self, prompt: npt.NDArray[np.int32], most: int) -> tuple[Slot | None, int]:
        """The row that holds most of the beginning of a prompt [S], and how many tokens of it can be used."""
        if not self._reuse or not most:
            return None, 0
        common = np.minimum(self.cache.common(prompt), most)  # [R]
        # Of equals, one that serves nobody, since it can be used in place.
        for slot in sorted(self._slots, key=lambda slot: (-common[slot.row], slot.generation is not None)):
            length = int(common[slot.row])
            if not length:
                break
            if self.cache.reusable(slot.row, length):
                return slot, length
        return None, 0

    def release(self, slot: Slot, *, keep: bool = True) -> None:
        """Let go of a generation; what is cached stays for others, if they may use it."""
        self._events += 1
        slot.generation, slot.prompt, slot.decodes, slot.left = None, NO_TOKENS, False, self._events
        if not (keep and self._reuse):
            self.cache.cut(slot.row, 0)

    def compact(self) -> list[Slot]:
        """Bring the rows that decode to the front; gives them in the order of their rows.

        Raises CacheMemoryError when there is no room to let two rows that are at work change places.
        """
        decoding = [slot for slot in self._slots if slot.decodes]
        holes = [slot for slot in self._slots[: len(decoding)] if not slot.decodes]
        for hole, slot in zip(holes, reversed(decoding), strict=False):
            self._move(slot, hole)
        return self._slots[: len(decoding)]

    def _move(self, slot: Slot, hole: Slot) -> None:
        """Let two slots change places; what nobody is served with is given up if there is no room for that."""
        try:
            if self.cached(hole):
                self.cache.swap(slot.row, hole.row)
                self._exchange(slot, hole)
                return
        except CacheMemoryError:
            if hole.generation is not None:
                raise
        self.cache.copy(slot.row, hole.row, self.cached(slot))
        self.cache.cut(slot.row, 0)
        self._exchange(slot, hole)

    def _exchange(self, first: Slot, second: Slot) -> None:
        first.row, second.row = second.row, first.row
        self._slots[first.row], self._slots[second.row] = first, second
