"""Measure one GGUF file in llama.cpp in this process; text.py starts it with the Python of llama.cpp's environment.

The C interface is called directly: a batch with a sequence for each row, greedy choice by argmax.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import llama_cpp
import numpy as np
from workload import Workload, generation_from_steps, measure, workload_from_arguments


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, data: object) -> None:
    del level, text, data


class Llama:
    """A model, a context for `rows` sequences, and a batch to fill."""

    def __init__(self, path: str, rows: int, length: int, prompt: int, threads: int) -> None:
        llama_cpp.llama_log_set(_silent, None)
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise SystemExit(f"llama.cpp cannot open {path}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = rows * length
        params.n_batch = rows * prompt
        params.n_seq_max = rows
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise SystemExit(f"llama.cpp cannot make a context of {rows} rows of {length} tokens")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(rows * prompt, 0, 1)

    def clear(self) -> None:
        """Forget all sequences."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)

    def next_tokens(self, rows: list[list[int]], position: int) -> list[int]:
        """Append tokens to each sequence at the same position; the most likely token behind each."""
        last = self._append(rows, position, only_last=True)
        return [int(self._logits(index).argmax()) for index in last]

    def all_logits(self, tokens: list[int]) -> np.ndarray:
        """Fill an empty context with one sequence [S]; the logits [S, V] behind every token."""
        self._append([tokens], 0, only_last=False)
        return np.stack([self._logits(index).copy() for index in range(len(tokens))])

    def _append(self, rows: list[list[int]], position: int, *, only_last: bool) -> list[int]:
        """The places, in the batch, of the last token of each sequence."""
        batch, last = self._batch, []
        batch.n_tokens = 0
        for row, tokens in enumerate(rows):
            for offset, token in enumerate(tokens):
                index = batch.n_tokens
                batch.token[index], batch.pos[index] = token, position + offset
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, row
                batch.logits[index] = not only_last or offset == len(tokens) - 1
                batch.n_tokens += 1
            last.append(batch.n_tokens - 1)
        code = llama_cpp.llama_decode(self._context, batch)
        if code:
            raise SystemExit(f"llama_decode failed with code {code}")
        return last

    def _logits(self, index: int) -> np.ndarray:
        """The logits [V] behind a token of the last batch, in llama.cpp's own memory."""
        logits = llama_cpp.llama_get_logits_ith(self._context, index)
        return np.ctypeslib.as_array(logits, (self._vocabulary,))


def steps(llama: Llama, prompts: list[list[int]], new: int) -> Iterator[None]:
    """The prompts with their first tokens, then one token for every row at each step."""
    tokens = llama.next_tokens(prompts, 0)
    yield
    for step in range(new - 1):
        tokens = llama.next_tokens([[token] for token in tokens], len(prompts[0]) + step)
        yield


def run(workload: Workload) -> None:
    """All repeats over one context."""
    started = time.perf_counter()
    length = workload.prompt + workload.new
    llama = Llama(workload.form, workload.batch, length, workload.prompt, workload.threads)
    load_s = time.perf_counter() - started

    def generate(prompts: list[list[int]], new: int) -> object:
        llama.clear()
        return generation_from_steps(len(prompts), steps(llama, prompts, new))

    measure(workload, load_s, generate)


if __name__ == "__main__":
    run(workload_from_arguments())
