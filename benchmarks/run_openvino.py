"""Measure one OpenVINO model in this process; text.py starts it with the Python of OpenVINO's environment.

Continuous batching, which is OpenVINO GenAI's fastest way for batches: it interleaves prompts and decoding, so tokens
that come before the last row has its first one are left out of the decode rate, and so is their time.
"""

from __future__ import annotations

import time

import numpy as np
import openvino as ov
import openvino_genai as genai
from workload import Generation, Workload, measure, workload_from_arguments

BATCHED_TOKENS = 512
"""Tokens of prompts that go through the graph at once, as in fmedge."""


def run(workload: Workload) -> None:
    """All repeats over one pipeline."""
    started = time.perf_counter()
    scheduler = genai.SchedulerConfig()
    scheduler.max_num_batched_tokens = BATCHED_TOKENS
    scheduler.max_num_seqs = workload.batch
    scheduler.enable_prefix_caching = False
    properties = {"INFERENCE_NUM_THREADS": workload.threads}
    pipeline = genai.ContinuousBatchingPipeline(workload.form, scheduler, "CPU", properties)
    load_s = time.perf_counter() - started
    requests = iter(range(1 << 30))

    def generate(prompts: list[list[int]], new: int) -> Generation:
        config = genai.GenerationConfig(max_new_tokens=new, ignore_eos=True, do_sample=False)
        ids = [ov.Tensor(np.array([prompt], np.int64)) for prompt in prompts]
        started = time.perf_counter()
        handles = [pipeline.add_request(next(requests), tensor, config) for tensor in ids]
        counts = [0] * len(prompts)
        first, tokens_at_first = 0.0, 0
        while pipeline.has_non_finished_requests():
            pipeline.step()
            for row, handle in enumerate(handles):
                while handle.can_read():
                    counts[row] += sum(len(output.generated_ids) for output in handle.read().values())
            if not first and all(counts):
                first, tokens_at_first = time.perf_counter() - started, sum(counts)
        return Generation(first, time.perf_counter() - started, tokens_at_first, sum(counts))

    measure(workload, load_s, generate)


if __name__ == "__main__":
    run(workload_from_arguments())
