"""What every run of `fmedge generate` is asked for, whatever the bundle makes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fmedge_runtimes.prefill_graph import PrefillGraph


@dataclass(frozen=True, slots=True)
class Call:
    """The options that all bundles take, as they were given."""

    bundle: Path
    prompts: tuple[str, ...]
    source: str | None
    output: str | None
    force: bool
    as_json: bool
    device: str | None
    max_batch: int | None
    threads: int | None
    memory: int | None
    cuda_graphs: bool
    prefill_graph: PrefillGraph
