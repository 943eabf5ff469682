"""Score a GGUF file in llama.cpp for quality.py, with the Python of llama.cpp's environment."""

from __future__ import annotations

import numpy as np
from run_llamacpp import Llama
from score import LogitsOf, score_from_arguments

LONGEST = 2048
"""Tokens of a window."""


def opened(path: str) -> LogitsOf:
    """A context of one sequence."""
    llama = Llama(path, rows=1, length=LONGEST, prompt=LONGEST, threads=1)

    def logits_of(ids: list[int]) -> np.ndarray:
        llama.clear()
        return llama.all_logits(ids)

    return logits_of


if __name__ == "__main__":
    score_from_arguments(opened)
