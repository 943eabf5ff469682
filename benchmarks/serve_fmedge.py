"""Serve requests as they come with one fmedge bundle in this process; text.py starts it."""

from __future__ import annotations

import threading
import time

from traffic import Traffic, Watch, serve
from workload import record_from_arguments

import fmedge
from fmedge import Sampling


def run(traffic: Traffic) -> None:
    """Through TextModel.submit; a thread for each request waits for it, as a server's would."""
    started = time.perf_counter()
    # Every prompt and every token is computed: random prompts share nothing, and random models repeat themselves.
    model = fmedge.load(
        traffic.form,
        device=traffic.device,
        threads=traffic.threads,
        max_batch=traffic.slots,
        prefix_reuse=False,
        prompt_lookup=False,
    )
    load_s = time.perf_counter() - started

    def begin(watch: Watch) -> None:
        asked = Sampling(max_new_tokens=watch.arrival.new, ignore_eos=True)
        request = model.submit([watch.arrival.prompt], asked)

        def wait() -> None:
            (completion,) = request.result()
            # Random models write tokens that have no text, and make no deltas; the completion knows their times.
            watch.first = watch.came + completion.stats.first_token_seconds
            watch.token(len(completion.tokens))
            watch.last = watch.came + completion.stats.seconds

        threading.Thread(target=wait, daemon=True).start()

    serve(traffic, load_s, begin, model.close)


if __name__ == "__main__":
    run(record_from_arguments(Traffic))
