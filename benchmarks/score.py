"""What every form of a model is asked to do for quality.py: the logits of the same windows, compared with PyTorch's.

The scripts score_*.py import this file from peers' environments, with fmedge_runtimes on PYTHONPATH: it needs numpy.

    score_from_arguments(lambda form: lambda ids: logits)       # ids [S] to logits [S, V]; one JSON line
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
from fmedge_runtimes.likelihood import Sums

LogitsOf = Callable[[list[int]], np.ndarray]


def score_from_arguments(opened: Callable[[str], LogitsOf]) -> None:
    """The command line is FORM WINDOWS.npy LOGITS.npy: windows [W, S] of token ids, PyTorch's logits [W, S, V]."""
    form, windows_file, logits_file = sys.argv[1:]
    windows = np.load(windows_file)  # [W, S]
    theirs = np.load(logits_file, mmap_mode="r")  # [W, S, V]
    logits_of = opened(form)
    sums = Sums()
    for ids, others in zip(windows.tolist(), theirs, strict=True):
        logits = logits_of(ids)[:, : others.shape[-1]]  # [S, V]: some pad the vocabulary
        # The last one predicts what is not known.
        sums.add(logits[:-1], ids[1:], others[:-1])
    print(json.dumps(asdict(sums)))


def write_logits(logits_of: LogitsOf, windows: np.ndarray, vocabulary: int, output: Path) -> None:
    """PyTorch's logits [W, S, V] of windows [W, S], window by window."""
    shape = (*windows.shape, vocabulary)
    whole = np.lib.format.open_memmap(output, mode="w+", dtype=np.float32, shape=shape)
    for number, ids in enumerate(windows.tolist()):
        whole[number] = logits_of(ids)
    whole.flush()
