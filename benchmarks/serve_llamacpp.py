"""Serve requests as they come with llama.cpp's server and one GGUF file; text.py starts it.

The server of xllamacpp is llama.cpp's own, with its slots and continuous batching, called without HTTP in between.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import xllamacpp
from traffic import LONGEST, Traffic, Watch, serve
from workload import record_from_arguments


def run(traffic: Traffic) -> None:
    """A slot for each request that may be served together."""
    started = time.perf_counter()
    params = xllamacpp.CommonParams()
    params.model.path = traffic.form
    params.n_parallel = traffic.slots
    params.n_ctx = traffic.slots * LONGEST
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = traffic.threads
    params.cont_batching = True
    params.verbosity = 0
    server = xllamacpp.Server(params)
    load_s = time.perf_counter() - started
    threads: list[threading.Thread] = []

    def begin(watch: Watch) -> None:
        asked = {
            "prompt": watch.arrival.prompt,
            "n_predict": watch.arrival.new,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
            "stream": True,
        }

        def count(chunk: Any) -> bool:  # noqa: ANN401 - a dictionary of the server's
            choices = chunk.get("choices") if isinstance(chunk, dict) else None
            if choices is None:
                raise SystemExit(f"the server answered {str(chunk)[:200]}")
            # The last chunk has no token, only the reason for the end.
            if choices[0]["finish_reason"] is None:
                watch.token()
            return False

        threads.append(threading.Thread(target=server.handle_completions, args=(asked, count), daemon=True))
        threads[-1].start()

    def finish() -> None:
        # A thread that is inside the server when the interpreter ends takes the process down.
        for thread in threads:
            thread.join()

    serve(traffic, load_s, begin, finish)


if __name__ == "__main__":
    run(record_from_arguments(Traffic))
