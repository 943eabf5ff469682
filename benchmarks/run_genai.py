"""Measure one onnxruntime-genai model in this process; text.py starts it with the Python of genai's environment.

Making the Generator, which allocates the cache, is not counted.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import numpy as np
import onnxruntime_genai as og
from workload import Generation, Workload, generation_from_steps, measure, workload_from_arguments


def run(workload: Workload) -> None:
    """Greedy search through og.Generator."""
    started = time.perf_counter()
    config = og.Config(workload.form)
    session_options = {"intra_op_num_threads": workload.threads}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": session_options}}}))
    model = og.Model(config)
    load_s = time.perf_counter() - started

    def generate(prompts: list[list[int]], new: int) -> Generation:
        length = len(prompts[0]) + new
        params = og.GeneratorParams(model)
        params.set_search_options(
            batch_size=len(prompts),
            do_sample=False,
            min_length=length,  # keeps end-of-sequence tokens away
            max_length=length,
            past_present_share_buffer=True,
        )
        generator = og.Generator(model, params)
        return generation_from_steps(len(prompts), steps(generator, prompts, new))

    measure(workload, load_s, generate)


def steps(generator: og.Generator, prompts: list[list[int]], new: int) -> Iterator[None]:
    """The prompts with their first tokens, then one token for every row at each step."""
    generator.append_tokens(np.array(prompts, np.int32))
    for _ in range(new):
        generator.generate_next_token()
        yield


if __name__ == "__main__":
    run(workload_from_arguments())
