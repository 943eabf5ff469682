"""Measure one fmedge bundle in this process; text.py starts it. Modes: "generate" (the public path) and "decoder"."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from fmedge_runtimes.backends import open_session
from fmedge_runtimes.bundle import open_bundle
from fmedge_runtimes.decoder import Decoder
from workload import Generation, Workload, generation_from_steps, measure, workload_from_arguments

import fmedge
from fmedge import Sampling


def run_generate(workload: Workload) -> None:
    """Through TextModel.generate, as a user runs it."""
    started = time.perf_counter()
    # Every prompt and every token is computed: rounds repeat the same prompts, and texts repeat themselves.
    model = fmedge.load(
        workload.form,
        device=workload.device,
        threads=workload.threads,
        max_batch=workload.batch,
        prefix_reuse=False,
        prompt_lookup=False,
    )
    load_s = time.perf_counter() - started

    def generate(prompts: list[list[int]], new: int) -> Generation:
        started = time.perf_counter()
        completions = model.generate(prompts, Sampling(max_new_tokens=new, ignore_eos=True))
        total = time.perf_counter() - started
        first = max(completion.stats.first_token_seconds for completion in completions)
        return Generation(first, total, len(prompts), sum(len(item.tokens) for item in completions))

    measure(workload, load_s, generate)


def run_decoder(workload: Workload) -> None:
    """The bare loop over Decoder with argmax: what the graph does without the engine around it."""
    started = time.perf_counter()
    bundle = open_bundle(Path(workload.form))
    graph = bundle.file(bundle.manifest.graphs["decoder"].file)
    decoder = Decoder(open_session(graph, workload.device, workload.threads, True), bundle.manifest.text)
    load_s = time.perf_counter() - started
    cache = decoder.new_cache()

    def steps(prompts: list[list[int]], new: int) -> Iterator[None]:
        cache.clear()
        cache.reserve(len(prompts), len(prompts[0]) + 1)
        tokens = [int(decoder.prefill(cache, row, prompt).argmax()) for row, prompt in enumerate(prompts)]
        yield
        for _ in range(new - 1):
            tokens = np.argmax(decoder.decode(cache, tokens), axis=1).tolist()
            yield

    measure(workload, load_s, lambda prompts, new: generation_from_steps(len(prompts), steps(prompts, new)))


if __name__ == "__main__":
    arguments = workload_from_arguments()
    {"generate": run_generate, "decoder": run_decoder}[arguments.mode](arguments)
