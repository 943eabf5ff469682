"""Who waits for a row: the requests take turns, one prompt each, so that none waits for all of another's.

Completions of one prompt stay together, since they share its prefill. What had a row before and gave it up goes first.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator

from fmedge_runtimes.generation import Generation
from fmedge_runtimes.request import Request


class FairQueue:
    """Generations that wait."""

    def __init__(self) -> None:
        self._returned: deque[Generation] = deque()
        self._requests: OrderedDict[Request, deque[Generation]] = OrderedDict()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Generation]:
        """Those that could be next: the first of each request."""
        yield from self._returned
        for generations in self._requests.values():
            yield generations[0]

    def add(self, request: Request, generations: Iterable[Generation]) -> None:
        """The generations of a new request."""
        waiting = deque(generations)
        if waiting:
            self._requests[request] = waiting
            self._size += len(waiting)

    def put_back(self, generation: Generation) -> None:
        """One that had a row: it is the next."""
        self._returned.appendleft(generation)
        self._size += 1

    def take(self, generation: Generation) -> None:
        """Remove one of those that could be next; then it is the turn of the other requests."""
        self._size -= 1
        if generation in self._returned:
            self._returned.remove(generation)
            return
        waiting = self._requests[generation.request]
        waiting.popleft()
        if not waiting:
            del self._requests[generation.request]
        elif waiting[0].prompt_index != generation.prompt_index:
            self._requests.move_to_end(generation.request)

    def remove(self, request: Request) -> list[Generation]:
        """Remove all generations of a request."""
        found = [generation for generation in self._returned if generation.request is request]
        for generation in found:
            self._returned.remove(generation)
        found += self._requests.pop(request, ())
        self._size -= len(found)
        return found
