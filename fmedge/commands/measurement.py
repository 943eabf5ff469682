"""How fast a bundle generates on this machine: requests of random tokens through the engine, timed step by step."""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from fmedge_runtimes.bundle import Bundle, open_bundle
from fmedge_runtimes.engine import EngineOptions
from fmedge_runtimes.errors import RequestError
from fmedge_runtimes.load import open_graphs, open_prefill
from fmedge_runtimes.prefill_graph import PrefillGraph
from fmedge_runtimes.sampling import Sampling
from fmedge_runtimes.text import TextModel

from fmedge.commands.stopwatch import Step, Stopwatch

SEED = 0
STATUS = Path("/proc/self/status")


@dataclass(frozen=True, slots=True)
class Workload:
    """What is measured."""

    batches: tuple[int, ...]
    prompt: int
    """Tokens of each prompt."""
    new: int
    """Tokens that each row generates; the first one comes from the prompt."""
    repeats: int
    device: str | None
    threads: int | None
    cuda_graphs: bool = True
    prefill_graph: PrefillGraph = "prompts"


@dataclass(frozen=True, slots=True)
class Measured:
    """One bundle at one batch size. Rates and the first token are medians of the repeats."""

    bundle: str
    device: str
    batch: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    """Of all rows together."""
    first_token_ms: float
    """From the request to the first token, the median of the rows: prompts go through one after the other."""
    token_ms_p50: float
    """From one token of a row to its next one."""
    token_ms_p95: float
    outside_graph: float
    """The share of the time of decoding that is not spent in the graph: sampling, text, scheduling."""
    peak_bytes: int
    """Most memory that the process has had until then; smaller batches were measured before."""
    weights_bytes: int
    """Of the graph and its weights, read once in each step."""


def measure(folder: Path, workload: Workload) -> list[Measured]:
    """Measure a bundle at each batch size. Raises FmedgeError as load does, and RequestError for what does not fit."""
    bundle = open_bundle(folder, checksums=False)
    facts = bundle.manifest.text
    if workload.prompt + workload.new > facts.context:
        raise RequestError(
            f"{workload.prompt} + {workload.new} tokens do not fit into the context of {folder}, {facts.context}; "
            "give less with --prompt and --new."
        )
    device = workload.device or bundle.manifest.target
    session, candidates = open_graphs(bundle, device, workload.threads, workload.cuda_graphs)
    prompts = open_prefill(bundle, device, workload.threads, workload.prefill_graph)
    stopwatch = Stopwatch(session)
    timed = None if prompts is None else Stopwatch(prompts, stopwatch.steps)
    batches = workload.prefill_graph == "batches"
    # Prompts and texts are random: neither what they share nor what they repeat may help.
    options = EngineOptions(max_batch=max(workload.batches), prefix_reuse=False, prompt_lookup=False)
    generator = np.random.default_rng(SEED)
    with TextModel(bundle, stopwatch, options, candidates, timed, batches=batches) as model:
        return [
            _at_batch(model, stopwatch, workload, batch, device, generator) for batch in sorted(set(workload.batches))
        ]


def _at_batch(
    model: TextModel, stopwatch: Stopwatch, workload: Workload, batch: int, device: str, generator: np.random.Generator
) -> Measured:
    prefill, decode, first, gaps, outside = [], [], [], [], []
    # A first run, that is not counted, makes the cache as large as it becomes.
    for repeat in range(-1, workload.repeats):
        shape = (batch, workload.prompt)
        prompts = generator.integers(0, model.bundle.manifest.text.vocabulary, shape).tolist()  # [B, S]
        stopwatch.steps.clear()
        start = time.perf_counter()
        done = model.generate(prompts, Sampling(workload.new, ignore_eos=True))
        for completion in done:
            if completion.error is not None:
                raise completion.error
        steps = _decode_steps(stopwatch.steps, batch, workload.new)
        if repeat < 0:
            continue
        firsts = [completion.stats.first_token_seconds for completion in done]
        prefilled = start + max(firsts)
        seconds = steps[-1].end - prefilled
        prefill.append(batch * workload.prompt / max(firsts))
        decode.append(batch * len(steps) / seconds)
        first.append(median(firsts))
        gaps += np.diff([prefilled, *(step.end for step in steps)]).tolist()
        outside.append(1 - sum(step.end - step.start for step in steps) / seconds)
    p50, p95 = np.percentile(gaps, [50, 95]).tolist()
    return Measured(
        bundle=str(model.bundle.folder),
        device=device,
        batch=batch,
        prefill_tokens_per_second=median(prefill),
        decode_tokens_per_second=median(decode),
        first_token_ms=median(first) * 1e3,
        token_ms_p50=p50 * 1e3,
        token_ms_p95=p95 * 1e3,
        outside_graph=median(outside),
        peak_bytes=peak_bytes(),
        weights_bytes=_weights(model.bundle),
    )


def _decode_steps(steps: list[Step], batch: int, new: int) -> list[Step]:
    """The steps behind the prompts, one token for each row."""
    last = steps[-(new - 1) :]
    if len(last) < new - 1 or any((step.rows, step.tokens) != (batch, 1) for step in last):
        raise RequestError(f"memory does not suffice to decode {batch} rows together; give a smaller --batch.")
    return last


def _weights(bundle: Bundle) -> int:
    text = bundle.manifest.text
    aside = {text.tokenizer, text.chat_template}
    return sum(facts.bytes for name, facts in bundle.manifest.files.items() if name not in aside)


def peak_bytes() -> int:
    """The most memory that this process has had."""
    try:
        lines = STATUS.read_text("ascii").splitlines()
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    # Unlike ru_maxrss, this begins anew when a process starts another program.
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def memory_bandwidth(threads: int | None, nbytes: int = 256 << 20, seconds: float = 0.5) -> float:
    """Bytes per second that this machine moves between memory and processor, the best of copies and of reads."""
    count = threads or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else threads or os.cpu_count()
    count = count or 1
    source = np.ones((count, nbytes // 16 // count), np.float64)  # [T, N]: half of it, the other half is the target
    target = np.zeros_like(source)  # [T, N]

    def copy(row: int) -> None:
        np.copyto(target[row], source[row])

    def read(row: int) -> None:
        source[row].max()

    best = 0.0
    with ThreadPoolExecutor(count) as pool:
        for work, moved in ((copy, 2 * source.nbytes), (read, source.nbytes)):
            end = time.perf_counter() + seconds / 2
            while True:
                start = time.perf_counter()
                list(pool.map(work, range(count)))
                now = time.perf_counter()
                best = max(best, moved / (now - start))
                if now >= end:
                    break
    return best
