"""Score a folder of onnxruntime-genai for quality.py, with the Python of genai's environment."""

from __future__ import annotations

import numpy as np
import onnxruntime_genai as og
from score import LogitsOf, score_from_arguments


def opened(folder: str) -> LogitsOf:
    """A generator for each window: the logits of a prompt are those of all its positions."""
    model = og.Model(folder)

    def logits_of(ids: list[int]) -> np.ndarray:
        params = og.GeneratorParams(model)
        params.set_search_options(batch_size=1, max_length=len(ids) + 1)
        generator = og.Generator(model, params)
        generator.append_tokens(np.array([ids], np.int32))
        logits = generator.get_output("logits")  # [1, S, V]
        if logits.shape[1] != len(ids):
            raise SystemExit(f"{folder} gives logits of {logits.shape[1]} of {len(ids)} positions")
        return np.array(logits[0], np.float32)

    return logits_of


if __name__ == "__main__":
    score_from_arguments(opened)
