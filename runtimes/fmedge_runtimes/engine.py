"""The engine: many requests over one decoder and one cache, in a thread of its own.

Each turn of the thread is one step of the graph: a piece of one prompt, on its own row, or one token for all rows that
decode. Rows join when their prompt is through and leave when they finish, so requests come and go between steps. A long
prompt goes in pieces, and the rows of other requests get their token between any two of them.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import numpy.typing as npt

from fmedge_runtimes.completion import FinishReason
from fmedge_runtimes.decoder import Decoder
from fmedge_runtimes.device_logits import DeviceLogits
from fmedge_runtimes.errors import (
    BackendError,
    CacheMemoryError,
    DeviceMemoryError,
    FmedgeError,
    QueueFullError,
    RequestError,
)
from fmedge_runtimes.fair_queue import FairQueue
from fmedge_runtimes.generation import Generation, light
from fmedge_runtimes.request import Request
from fmedge_runtimes.sampler import choose
from fmedge_runtimes.slots import NO_TOKENS, Slot, Slots
from fmedge_runtimes.summary import LogitsRow

SHARED_CHUNK = 64
"""Tokens of prompts that go through between two steps of other requests' rows: the fewest at nearly full speed."""
LOOKUP_ROWS = 2
"""With more rows than this, a step for all of them is cheaper than one with a draft for each."""
LEAST_CHUNK = 16
"""What a shorter piece of a prompt counts for: a step of the graph reads all weights, however few tokens it has."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How much an engine takes on."""

    max_batch: int = 16
    """Rows that are decoded together at most."""
    max_waiting: int = 1024
    """Completions that may wait while that many rows are taken; who comes later is refused."""
    cache_bytes: int | None = None
    """What the cache may take; None: what the machine has free."""
    prefix_reuse: bool = True
    """Whether prompts start from what other rows have cached."""
    prompt_lookup: bool = True
    """Whether texts that repeat themselves are decoded several tokens at a time."""

    def __post_init__(self) -> None:
        for name, least in (("max_batch", 1), ("max_waiting", 0)):
            if getattr(self, name) < least:
                raise RequestError(f"{name} is {getattr(self, name)}; it must be at least {least}.")


DEFAULTS = EngineOptions()


class Engine:
    """Serves requests with one decoder. `submit`, `cancel` and `close` may be called from any thread."""

    def __init__(
        self, decoder: Decoder, options: EngineOptions, what_fits: Callable[[int, int], str] = lambda *_: ""
    ) -> None:
        """`what_fits`: what to say of so many rows, and so many bytes of cache, when a GPU is out of memory."""
        self._decoder = decoder
        self._options = options
        self._what_fits = what_fits
        # Shared between threads, under the lock.
        self._news = threading.Condition()
        self._thread: threading.Thread | None = None
        self._arrived: deque[tuple[Request, Sequence[Generation], float]] = deque()
        self._stopped: deque[Request] = deque()
        self._unfinished = 0
        self._submitted = 0
        self._closed = False
        # The thread's own.
        self._waiting = FairQueue()
        self._slots = self._new_slots()
        self._requests: dict[Request, float] = {}
        """All that are not done, and when they must be."""
        self._crowded = False
        """Memory does not suffice for another row; it is tried again when one leaves."""
        self._budget = SHARED_CHUNK
        """Tokens of prompts that may go through before the rows that decode get their next one."""
        self._guests_turn = False
        """The next piece is a short prompt's, if one waits behind a long one."""
        self._last_prompt: tuple[npt.NDArray[np.int32], npt.NDArray[np.floating]] | None = None
        """The last prompt [S] that went through and the logits [V] behind it."""

    def _new_slots(self) -> Slots:
        return Slots(self._decoder.new_cache(self._options.cache_bytes), reuse=self._options.prefix_reuse)

    def submit(self, request: Request, generations: Sequence[Generation], deadline: float = math.inf) -> None:
        """Take on a request; it ends with "timeout" at the deadline (time.perf_counter).

        Raises QueueFullError, and RequestError when the engine is closed.
        """
        with self._news:
            if self._closed:
                raise RequestError("the model is closed; load it again.")
            waiting = self._unfinished - self._options.max_batch
            if waiting >= self._options.max_waiting and generations:
                raise QueueFullError(
                    f"{max(waiting, 0)} completions wait for one of {self._options.max_batch} rows already; try again "
                    "later, or load the model with a larger max_waiting or max_batch."
                )
            for generation in generations:
                generation.order = self._submitted
                self._submitted += 1
            self._unfinished += len(generations)
            request.on_finished = self._count_off
            self._arrived.append((request, generations, deadline))
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="fmedge-engine", daemon=True)
                self._thread.start()
            self._news.notify()

    def _count_off(self, completions: int) -> None:
        with self._news:
            self._unfinished -= completions

    def cancel(self, request: Request) -> None:
        """End a request at the next step."""
        with self._news:
            self._stopped.append(request)
            self._news.notify()

    def close(self) -> None:
        """End all requests and the thread; returns when the step that it is in is over."""
        with self._news:
            self._closed = True
            self._news.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _serve(self) -> None:
        """The thread: one step after the other while there is work."""
        closed = False
        while not closed:
            try:
                closed = not self._listen()
                if closed:
                    for request in list(self._requests):
                        self._end(request, "cancelled")
                else:
                    self._step()
            except Exception as error:  # whatever it is, nobody may wait for ever
                self._break_down(error)
        self._slots, self._last_prompt = self._new_slots(), None

    def _listen(self) -> bool:
        """Take note of what others want, and wait for it if there is nothing to do. False when all is over."""
        with self._news:
            while not (self._closed or self._arrived or self._stopped or self._waiting or len(self._slots)):
                self._news.wait()
            arrived, self._arrived = self._arrived, deque()
            stopped, self._stopped = self._stopped, deque()
        for request, generations, deadline in arrived:
            self._waiting.add(request, generations)
            if not request.done:
                self._requests[request] = deadline
        for request in stopped:
            self._end(request, "cancelled")
        now = time.perf_counter()
        for request in [request for request, deadline in self._requests.items() if deadline <= now]:
            self._end(request, "timeout")
        return not self._closed

    def _end(self, request: Request, reason: FinishReason) -> None:
        """End what is unfinished of a request."""
        for slot in [slot for slot in self._slots if slot.served.request is request]:
            slot.served.finish(reason)
            self._leave(slot)
        for generation in self._waiting.remove(request):
            generation.finish(reason)
        self._requests.pop(request, None)

    def _fail(self, slots: Sequence[Slot], error: FmedgeError) -> None:
        """End the requests of the rows of a step that failed; what these rows hold is not to be trusted."""
        requests = {slot.served.request for slot in slots}
        if isinstance(error, DeviceMemoryError):
            cache = self._slots.cache
            error = DeviceMemoryError(
                f"{error} {self._what_fits(len(slots), cache.nbytes(cache.rows, cache.capacity))}"
            )
        for slot in slots:
            self._leave(slot, keep=False)
        for request in requests:
            request.fail(light(error))
            self._end(request, "error")

    def _break_down(self, error: Exception) -> None:
        """End everything after an error that should not be, and begin anew."""
        failure = BackendError(f"the engine failed ({type(error).__name__}: {error}); report this.")
        failure.__cause__ = error
        requests, self._requests = self._requests, {}
        self._waiting, self._slots, self._last_prompt = FairQueue(), self._new_slots(), None
        self._crowded = False
        for request in requests:
            request.fail(failure)

    def _leave(self, slot: Slot, *, keep: bool = True) -> None:
        request = slot.served.request
        self._slots.release(slot, keep=keep)
        self._crowded = False
        self._forget(request)

    def _forget(self, request: Request) -> None:
        if request.done:
            self._requests.pop(request, None)

    def _step(self) -> None:
        """One step of the graph: a piece of a prompt, or a token for all rows that decode."""
        slot = self._next_prompt()
        if slot is not None:
            self._prefill(slot)
        else:
            self._decode()

    def _next_prompt(self) -> Slot | None:
        """The row whose prompt goes on; None when the rows that decode come first, or no prompt waits."""
        slot = self._slots.prefilling
        generation = slot.generation if slot is not None else next(iter(self._waiting), None)
        if generation is None or (self._budget <= 0 and self._keeps_waiting(generation.request)):
            return None
        if slot is None:
            return self._admit()
        return (self._guest(slot) if self._guests_turn else None) or slot

    def _keeps_waiting(self, request: Request) -> bool:
        """Whether rows of others decode. Those of the same request do not mind: their caller wants all of it."""
        return any(slot.decodes and slot.served.request is not request for slot in self._slots)

    def _admit(self) -> Slot | None:
        """Give rows to those that wait, until one has a prompt to prefill."""
        while self._waiting and len(self._slots) < self._options.max_batch and not self._crowded:
            slot = self._place(next(iter(self._waiting)))
            if slot is not None:
                return slot
        return None

    def _guest(self, host: Slot) -> Slot | None:
        """Another request's short prompt, that goes through between two pieces of a long one."""
        if len(self._slots) >= self._options.max_batch or self._crowded:
            return None
        for generation in islice(self._waiting, self._options.max_batch):
            prompt = np.array(generation.cached[: SHARED_CHUNK + 1], np.int32)  # [S]
            both = min(len(prompt), len(host.prompt))
            alike = np.count_nonzero(np.cumsum(prompt[:both] != host.prompt[:both]) == 0)
            # One that begins like the long prompt waits: it has less to do when that is through.
            other = generation.request is not host.served.request
            if other and len(prompt) <= SHARED_CHUNK and 2 * alike < len(prompt):
                return self._place(generation)
        return None

    def _place(self, generation: Generation) -> Slot | None:
        """Give a row to one that waits. None if it has nothing to prefill, or there is no memory for it.

        Without memory it waits on while others have rows; else it can never be served.
        """
        prompt = np.array(generation.cached, np.int32)  # [S]
        most, busy = self._options.max_batch, len(self._slots)
        try:
            wished = min(most, busy + len(self._waiting))
            self._slots.reserve(busy + 1, len(prompt) + 1, wished=wished, most=most)
        except CacheMemoryError as error:
            self._crowded = busy > 0  # rows that leave make room
            if not self._crowded:
                self._waiting.take(generation)
                generation.finish("error", error)
                self._forget(generation.request)
            return None
        self._waiting.take(generation)
        logits = None
        if self._last_prompt is not None and np.array_equal(self._last_prompt[0], prompt):
            logits = self._last_prompt[1]
        slot = self._slots.place(generation, prompt, whole=logits is not None)
        cached = self._slots.cached(slot)
        if not generation.tokens:
            generation.reused = cached
        if logits is not None and cached == len(prompt):
            slot.decodes = True
            self._take([slot], logits[None])
            return None
        return slot

    def _prefill(self, slot: Slot) -> None:
        """Put a piece of a prompt through the graph, and choose the first token behind the last piece."""
        done = self._slots.cached(slot)
        piece = slot.prompt[done : done + self._decoder.chunk]
        if self._keeps_waiting(slot.served.request):
            piece = piece[: max(self._budget, LEAST_CHUNK)]
            self._budget -= max(len(piece), LEAST_CHUNK)
        try:
            logits = self._decoder.extend(self._slots.cache, slot.row, piece)  # [V]
        except FmedgeError as error:
            self._fail([slot], error)
            return
        slot.decodes = done + len(piece) == len(slot.prompt)
        self._guests_turn = not slot.decodes
        if slot.decodes:
            self._last_prompt = (slot.prompt, logits)
            self._take([slot], logits[None])

    def _decode(self) -> None:
        """One token for every row that decodes; where memory does not suffice for all, the latest waits again."""
        self._budget = SHARED_CHUNK
        try:
            slots = self._slots.compact()
            if not slots:
                return
            self._slots.reserve(len(slots), 1 + max(map(self._slots.cached, slots)))
        except CacheMemoryError:
            # A last row waits, too: into an empty cache it may still fit.
            latest = max(self._slots, key=lambda slot: slot.served.order)
            self._waiting.put_back(latest.served)
            self._slots.release(latest)
            self._crowded = len(self._slots) > 0
            return
        drafts = self._drafts(slots)
        if drafts:
            for slot, draft in zip(slots, drafts, strict=True):
                self._verify(slot, draft)
            return
        try:
            last = [slot.served.tokens[-1] for slot in slots]
            logits = self._decoder.decode_in_place(self._slots.cache, last)  # [R, V]
        except FmedgeError as error:
            self._fail(slots, error)
            return
        self._take(slots, logits)

    def _drafts(self, slots: Sequence[Slot]) -> list[npt.NDArray[np.int32]] | None:
        """What may come next in each row [D], which can be nothing; None if that is so for all of them."""
        if not self._options.prompt_lookup or len(slots) > LOOKUP_ROWS:
            return None
        cache = self._slots.cache
        drafts: list[npt.NDArray[np.int32]] = []
        for slot in slots:
            generation, length = slot.served, self._slots.cached(slot)
            if not cache.can_take_back(slot.row, 2):
                drafts.append(NO_TOKENS)
                continue
            said = np.append(cache.tokens[slot.row, :length], np.int32(generation.tokens[-1]))  # [S]
            draft = generation.lookup.draft(said, min(generation.room, cache.capacity - length) - 1)
            drafts.append(draft if cache.can_take_back(slot.row, 1 + len(draft)) else draft[:0])
        return drafts if any(map(len, drafts)) else None

    def _verify(self, slot: Slot, draft: npt.NDArray[np.int32]) -> None:
        """One step for one row with a draft: its tokens are taken as long as they are those that are chosen."""
        cache, generation, length = self._slots.cache, slot.served, self._slots.cached(slot)
        try:
            logits = self._decoder.verify(cache, slot.row, [generation.tokens[-1], *draft.tolist()])  # [1 + D, V]
        except FmedgeError as error:
            self._fail([slot], error)
            return
        now, taken = time.perf_counter(), 0
        generation.lookup.drafted += len(draft)
        for guess, row in zip([*draft.tolist(), None], logits, strict=True):
            (token,) = choose(row[None], [generation.sampler_row]).tolist()
            right = token == guess
            generation.lookup.accepted += right
            taken += right
            finished = generation.take(token, LogitsRow(partial(np.asarray, row)), now)
            if finished or not right:
                break
        cache.cut(slot.row, length + 1 + taken)
        generation.lookup.learn(len(draft), taken)
        if finished:
            self._leave(slot)

    def _take(self, slots: Sequence[Slot], logits: npt.NDArray[np.floating] | DeviceLogits) -> None:
        """Choose a token for each row from logits [R, V]; those that finish leave."""
        generations = [slot.served for slot in slots]
        try:
            chosen = choose(logits, [generation.sampler_row for generation in generations])
        except FmedgeError as error:  # from the device
            self._fail(slots, error)
            return
        rows = [
            logits.row(number) if isinstance(logits, DeviceLogits) else LogitsRow(partial(logits.__getitem__, number))
            for number in range(len(slots))
        ]
        now = time.perf_counter()
        for number, (slot, generation, token) in enumerate(zip(slots, generations, chosen.tolist(), strict=True)):
            if generation.take(token, rows[number], now):
                self._leave(slot)
