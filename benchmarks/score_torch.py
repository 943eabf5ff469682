"""Write PyTorch's logits in fp32 for quality.py: python score_torch.py MODEL WINDOWS.npy LOGITS.npy."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from score import write_logits
from transformers import AutoModelForCausalLM


def main(folder: str, windows: Path, output: Path) -> None:
    """The logits of all windows."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()

    def logits_of(ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]  # [S, V]
        return logits.numpy()

    write_logits(logits_of, np.load(windows), model.config.vocab_size, output)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
