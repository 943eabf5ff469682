"""Perplexity: how many tokens a model hesitates between, on the average, before each next one."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

TOKENS_TOGETHER = 4096
"""Per forward pass; the logits of a vocabulary of 32768 then take half a gigabyte."""


def mean_loss(model: PreTrainedModel, tokens: NDArray[np.uint32], sequence_length: int) -> float:
    """Predict every token but the first, in windows of sequence_length; nats per token, in float32."""
    windows = [
        torch.from_numpy(tokens[start : start + sequence_length + 1].astype(np.int64))  # [<= T + 1]
        for start in range(0, len(tokens) - 1, sequence_length)
    ]
    full = [window for window in windows if len(window) == sequence_length + 1]
    rows = max(TOKENS_TOGETHER // sequence_length, 1)
    batches = [torch.stack(full[start : start + rows]) for start in range(0, len(full), rows)]  # [B, T + 1]
    batches += [window[None] for window in windows[len(full) :]]
    was_training = model.training
    model.eval()
    total = 0.0
    with torch.inference_mode():
        for batch in (each.to(model.device) for each in batches):
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits  # [B, T, V]
            loss = torch.nn.functional.cross_entropy(
                logits.float().flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
            )
            total += loss.item()
    model.train(was_training)
    return total / (len(tokens) - 1)
