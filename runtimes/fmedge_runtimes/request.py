"""A request in flight: what the engine gives to it, and how those who wait for it get it.

    request = model.submit("Once", Sampling(max_new_tokens=64))
    for delta in request:                 # or: async for delta in request
        print(delta.text, end="")
    (completion,) = request.result()      # or: await request.wait()

Text that nobody has fetched yet is put together, so that who reads slowly finds one long delta: the engine never waits
for a reader, and what lies here is never more than the text itself.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from fmedge_runtimes.completion import Completion, Delta
from fmedge_runtimes.errors import FmedgeError


class Request:
    """All completions of one call. May be read from one thread, or one coroutine, and cancelled from any."""

    def __init__(self, cancel: Callable[[Request], None]) -> None:
        """`cancel` tells the engine that what is unfinished is not wanted any more."""
        self._left = 0
        self._rows = 0
        """Sequences that the engine still generates; with best_of more than the completions that come of them."""
        self._cancel = cancel
        self.on_finished: Callable[[int], None] = lambda _: None
        """Told how many sequences have just come to their end, before anybody else hears of it."""
        self._changed = threading.Condition()
        self._finished = threading.Event()
        self._pending: dict[tuple[int, int], tuple[list[str], Completion | None]] = {}
        self._completions: list[Completion] = []
        self._failure: FmedgeError | None = None
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    def expect(self, completions: int, rows: int) -> None:
        """Say how many completions are to come, and of how many sequences."""
        self._left = completions
        self._rows = rows
        if not completions:
            self._finished.set()

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self._finished.is_set()

    def cancel(self) -> None:
        """Stop it at the engine's next step; what is unfinished ends with finish_reason "cancelled"."""
        if not self.done:
            self._cancel(self)

    def result(self, timeout: float | None = None) -> list[Completion]:
        """Wait for the completions, in the order of the prompts, n for each.

        Raises BackendError when the graph failed, and Python's TimeoutError when they are not there after `timeout`
        seconds; the request goes on then.
        """
        if not self._finished.wait(timeout):
            raise TimeoutError(f"the completions are not there after {timeout} seconds; wait longer, or cancel().")
        return self._results()

    async def wait(self) -> list[Completion]:
        """Like result, for coroutines; a cancelled one cancels the request."""
        try:
            while not self.done:
                await self._wake(only_when_done=True)
        finally:
            self.cancel()
        return self._results()

    def _results(self) -> list[Completion]:
        if self._failure is not None:
            raise self._failure.with_traceback(None)
        return sorted(self._completions, key=lambda completion: (completion.prompt_index, completion.index))

    def __iter__(self) -> Request:
        return self

    def __next__(self) -> Delta:
        """The next piece of text; waits for it. Raises as result does."""
        with self._changed:
            self._changed.wait_for(lambda: self._pending or self.done)
            delta = self._take()
        if delta is None:
            raise StopIteration
        return delta

    def __aiter__(self) -> Request:
        return self

    async def __anext__(self) -> Delta:
        """The next piece of text, for coroutines."""
        while True:
            with self._changed:
                over = self.done
                delta = self._take()
            if delta is not None:
                return delta
            if over:
                raise StopAsyncIteration
            await self._wake(only_when_done=False)

    def _take(self) -> Delta | None:
        if not self._pending:
            if self._failure is not None:
                raise self._failure.with_traceback(None)
            return None
        place = next(iter(self._pending))
        pieces, completion = self._pending.pop(place)
        return Delta(*place, "".join(pieces), completion)

    async def _wake(self, *, only_when_done: bool) -> None:
        """Wait until the engine has something."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        with self._changed:
            if self.done or (self._pending and not only_when_done):
                return
            self._waiters.append((loop, future))
        await future

    def row_finished(self) -> None:
        """A sequence came to its end; what becomes of it follows."""
        with self._changed:
            if self._failure is None:
                self._rows -= 1
                self.on_finished(1)

    def put(self, delta: Delta) -> None:
        """Take a delta from the engine; one that comes after a failure is dropped."""
        with self._changed:
            if self._failure is not None:
                return
            place = (delta.prompt_index, delta.index)
            pieces, _ = self._pending.get(place, ([], None))
            if delta.text:
                pieces.append(delta.text)
            self._pending[place] = (pieces, delta.completion)
            if delta.completion is not None:
                self._completions.append(delta.completion)
                self._left -= 1
                if not self._left:
                    self._finished.set()
            self._notify()

    def fail(self, error: FmedgeError) -> None:
        """End it with an error of the engine's: whoever reads gets it after the text that is there."""
        with self._changed:
            if not self.done:
                self._failure = error
                self.on_finished(self._rows)
                self._left = self._rows = 0
                self._finished.set()
                self._notify()

    def _notify(self) -> None:
        self._changed.notify_all()
        waiters, self._waiters = self._waiters, []
        for loop, future in waiters:
            try:
                loop.call_soon_threadsafe(_resolve, future)
            except RuntimeError:  # its loop is closed: nobody waits there any more
                continue


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
