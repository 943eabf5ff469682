"""Requests that come at random times, and what became of them: the serving scenario of text.py.

The runners import this file from peers' environments, so it needs nothing but the standard library.

    traffic = record_from_arguments(Traffic)
    serve(traffic, load_s, begin, finish)       # prints one JSON line, read by text.py
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from workload import peak_resident_mib

SHORT, LONG = (8, 64), (256, 640)
"""Prompt lengths: from a question to a page."""
LONG_SHARE = 0.3
NEW = (16, 96)
"""Tokens to generate."""
LONGEST = LONG[1] + NEW[1]
WARM_UP = 16
"""Tokens of the request that comes before all others and is not measured."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request: greedy, end-of-sequence tokens ignored."""

    at: float
    """Seconds from the first one."""
    prompt: list[int]
    new: int


@dataclass(frozen=True, slots=True)
class Traffic:
    """A number of requests, the same for every peer: at a higher rate they are the same ones, closer together."""

    form: str
    """Folder or file of the model, in the peer's own form."""
    vocabulary: int
    rate: float
    """Requests per second, on average."""
    requests: int
    slots: int
    """Requests that a peer may serve together."""
    threads: int
    device: str = "cpu"

    def arrivals(self) -> list[Arrival]:
        """A Poisson process: exponential gaps; lengths uniform within short and long."""
        draw, at, found = random.Random(2000), 0.0, []
        for _ in range(self.requests):
            lengths = LONG if draw.random() < LONG_SHARE else SHORT
            prompt = [draw.randrange(3, self.vocabulary) for _ in range(draw.randint(*lengths))]
            found.append(Arrival(at, prompt, draw.randint(*NEW)))
            at += draw.expovariate(1.0) / self.rate
        return found


@dataclass(frozen=True, slots=True)
class Served:
    """What one process measured: a value for each request, from its arrival on."""

    load_s: float
    peak_mib: float
    first_token_ms: list[float]
    token_ms: list[float]
    """From one token of a request to the next, on average."""
    latency_ms: list[float]
    tokens_per_s: float
    """Generated tokens of all requests, by the time from the first arrival to the last token."""
    tokens_per_cpu_s: float
    """The same by the processor time of all threads, which depends less on what else the machine does."""


class Watch:
    """When a request came, had its first token, and was done; told from any thread."""

    def __init__(self, arrival: Arrival) -> None:
        self.arrival = arrival
        self.came = time.perf_counter()
        self.first = self.last = 0.0
        self.tokens = 0
        self.over = threading.Event()

    def token(self, count: int = 1) -> None:
        """One more token is there."""
        self.last = time.perf_counter()
        self.first = self.first or self.last
        self.tokens += count
        if self.tokens >= self.arrival.new:
            self.over.set()


def serve(traffic: Traffic, load_s: float, begin: Callable[[Watch], None], finish: Callable[[], None]) -> None:
    """Send all requests to `begin`, which must not block, wait until all are over, and print what was measured.

    `finish` ends the peer.
    """
    warm = Watch(Arrival(0.0, [5] * WARM_UP, WARM_UP))
    begin(warm)
    _wait(warm)
    watches: list[Watch] = []
    started, cpu = time.perf_counter(), time.process_time()
    for arrival in traffic.arrivals():
        time.sleep(max(0.0, started + arrival.at - time.perf_counter()))
        watches.append(Watch(arrival))
        begin(watches[-1])
    for watch in watches:
        _wait(watch)
    wrong = [watch.tokens for watch in watches if watch.tokens != watch.arrival.new]
    if wrong:
        raise SystemExit(f"{len(wrong)} requests got another number of tokens than asked for")
    cpu = time.process_time() - cpu
    tokens = sum(watch.tokens for watch in watches)
    served = Served(
        load_s=load_s,
        peak_mib=peak_resident_mib(),
        first_token_ms=[(watch.first - watch.came) * 1e3 for watch in watches],
        token_ms=[(watch.last - watch.first) * 1e3 / (watch.tokens - 1) for watch in watches],
        latency_ms=[(watch.last - watch.came) * 1e3 for watch in watches],
        tokens_per_s=tokens / (max(watch.last for watch in watches) - started),
        tokens_per_cpu_s=tokens / cpu,
    )
    finish()
    print(json.dumps(asdict(served)), flush=True)


def _wait(watch: Watch) -> None:
    if not watch.over.wait(300):
        raise SystemExit(f"a request got {watch.tokens} of {watch.arrival.new} tokens in 300 s")
