"""The original of a bundle in PyTorch, for `fmedge eval --against`.

with open_original("path/to/model", context=512) as original:
    original.each_logits([[1, 2, 3]], lambda number, logits: ...)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from fmedge_runtimes.errors import SourceError

from fmedge_converters.checkpoint import Checkpoint
from fmedge_converters.decoder import empty_model
from fmedge_converters.reference import Reference, open_reference
from fmedge_converters.source import is_pipeline, open_source


@contextmanager
def open_original(name: str, context: int) -> Iterator[Reference]:
    """A folder, hub id or file that `fmedge export` takes, in fp32, for texts of up to `context` tokens.

    A small one is loaded as transformers loads it, a large one runs layer by layer. Raises SourceError.
    """
    if is_pipeline(name, None):
        raise SourceError(f"{name} makes images, not text; give the model that the bundle was made of.")
    source = open_source(name, None)
    with Checkpoint(source.files, np.dtype(np.float32)) as checkpoint:
        checkpoint.weights(empty_model(source.config, torch.float32))
        parameters = checkpoint.parameters
    with open_reference(source, parameters, context) as reference:
        yield reference
