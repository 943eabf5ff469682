"""Score a bundle for quality.py, window by window through its decoder, as `fmedge eval` does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from fmedge_runtimes.load import open_decoder
from score import LogitsOf, score_from_arguments


def opened(folder: str) -> LogitsOf:
    """The decoder with one row."""
    _, decoder = open_decoder(Path(folder))
    cache = decoder.new_cache()
    return lambda ids: np.asarray(decoder.score(cache, ids))


if __name__ == "__main__":
    score_from_arguments(opened)
