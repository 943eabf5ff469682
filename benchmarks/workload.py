"""What every peer is asked to do, and what it reports: one frozen record for each.

The runners import this file from peers' environments, so it needs nothing but the standard library.

    workload = workload_from_arguments()
    prompts = workload.prompts(repeat=0)             # batch lists of token ids
    print_measurement(Measurement(...))              # one JSON line, read by text.py
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

Record = TypeVar("Record")

WARM_UP = -1
"""The number of the repeat that is not measured; it generates WARM_UP_TOKENS only."""
WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Workload:
    """Greedy generation of a batch of random prompts, end-of-sequence tokens ignored."""

    form: str
    """Folder or file of the model, in the peer's own form."""
    vocabulary: int
    batch: int = 1
    prompt: int = 128
    new: int = 128
    threads: int = 1
    repeats: int = 3
    mode: str = ""
    """Which way through the peer is measured, for those that have several."""
    device: str = "cpu"

    def prompts(self, repeat: int) -> list[list[int]]:
        """Token ids; other ones in every repeat, so that no prefix cache helps."""
        draw = random.Random(1000 + repeat)
        return [[draw.randrange(3, self.vocabulary) for _ in range(self.prompt)] for _ in range(self.batch)]

    def new_tokens(self, repeat: int) -> int:
        """Tokens to generate for each prompt."""
        return min(WARM_UP_TOKENS, self.new) if repeat == WARM_UP else self.new

    def all_repeats(self) -> range:
        """The warm-up, then the measured repeats."""
        return range(WARM_UP, self.repeats)


@dataclass(frozen=True, slots=True)
class Generation:
    """Seconds of one batch. `first` is when the last row has its first token, `tokens_at_first` all tokens by then."""

    first: float
    total: float
    tokens_at_first: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Measurement:
    """Samples of one process: one value for each measured repeat."""

    load_s: float
    peak_mib: float
    first_token_ms: list[float]
    prefill_tokens_per_s: list[float]
    decode_tokens_per_s: list[float]


def record_from_arguments(kind: type[Record]) -> Record:
    """The record that text.py passed on the command line: --name value for every field."""
    parser = argparse.ArgumentParser(description="Run one peer; started by text.py.")
    types = {"str": str, "int": int, "float": float}
    for field in fields(kind):
        parser.add_argument(f"--{field.name}", required=True, type=types[str(field.type)])
    return kind(**vars(parser.parse_args()))


def workload_from_arguments() -> Workload:
    """The workload of the command line."""
    return record_from_arguments(Workload)


def arguments_from_record(record: Any) -> list[str]:  # noqa: ANN401 - any dataclass
    """The inverse of record_from_arguments."""
    return [part for name, value in asdict(record).items() for part in (f"--{name}", str(value))]


def measure(workload: Workload, load_s: float, generate: Callable[[list[list[int]], int], Generation]) -> None:
    """Run all repeats of `generate(prompts, new tokens)` and print the measurement."""
    runs = [generate(workload.prompts(repeat), workload.new_tokens(repeat)) for repeat in workload.all_repeats()]
    measured = runs[1:]
    wrong = [run.tokens for run in measured if run.tokens != workload.batch * workload.new]
    if wrong:
        raise SystemExit(f"{wrong[0]} tokens came back instead of {workload.batch * workload.new}")
    measurement = Measurement(
        load_s=load_s,
        peak_mib=peak_resident_mib(),
        first_token_ms=[run.first * 1e3 for run in measured],
        prefill_tokens_per_s=[workload.batch * workload.prompt / run.first for run in measured],
        decode_tokens_per_s=[(run.tokens - run.tokens_at_first) / (run.total - run.first) for run in measured],
    )
    print(json.dumps(asdict(measurement)))


def generation_from_steps(rows: int, steps: Iterator[object]) -> Generation:
    """Time a generator that yields after every step that gives each of the rows one token, from the prefill on."""
    started = time.perf_counter()
    next(steps)
    first = time.perf_counter() - started
    later = sum(1 for _ in steps)
    return Generation(first, time.perf_counter() - started, rows, rows * (1 + later))


def peak_resident_mib() -> float:
    """Peak resident memory of this process, mapped files included, from Linux' VmHWM."""
    status = Path("/proc/self/status").read_text("ascii", "replace")
    match = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(match[1]) / 1024 if match else float("nan")
