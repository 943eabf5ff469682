"""Serve requests as they come with one onnxruntime-genai model in this process; text.py starts it.

A Generator has one length for all its rows, and its Engine batches requests on CUDA only, so on the CPU an application
serves them one after the other.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable

import numpy as np
import onnxruntime_genai as og
from traffic import Traffic, Watch, serve
from workload import record_from_arguments


def run(traffic: Traffic) -> None:
    """Greedy search through og.Generator, first come, first served."""
    started = time.perf_counter()
    config = og.Config(traffic.form)
    session_options = {"intra_op_num_threads": traffic.threads}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": session_options}}}))
    model = og.Model(config)
    load_s = time.perf_counter() - started
    waiting: queue.SimpleQueue[Watch | None] = queue.SimpleQueue()
    worker = threading.Thread(target=_work, args=(model, waiting.get), daemon=True)
    worker.start()

    def finish() -> None:
        waiting.put(None)
        worker.join()

    serve(traffic, load_s, waiting.put, finish)


def _work(model: og.Model, following: Callable[[], Watch | None]) -> None:
    while (watch := following()) is not None:
        arrival = watch.arrival
        length = len(arrival.prompt) + arrival.new
        params = og.GeneratorParams(model)
        # The least length keeps end-of-sequence tokens away.
        params.set_search_options(do_sample=False, min_length=length, max_length=length, past_present_share_buffer=True)
        generator = og.Generator(model, params)
        generator.append_tokens(np.array([arrival.prompt], np.int32))
        for _ in range(arrival.new):
            generator.generate_next_token()
            watch.token()


if __name__ == "__main__":
    run(record_from_arguments(Traffic))
