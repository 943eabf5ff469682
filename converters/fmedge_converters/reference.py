"""PyTorch's own computation of a source in fp32, for comparison.

A small model is loaded the ordinary way, by transformers, so that a wrong reading of its weights shows too. A large one
never lies in memory: its layers run one after the other, on weights as fmedge reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from fmedge_runtimes.errors import SourceError
from fmedge_runtimes.memory import available_bytes
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from fmedge_converters.checkpoint import Checkpoint
from fmedge_converters.decoder import empty_model, quiet_libraries
from fmedge_converters.first_line import first_line
from fmedge_converters.pieces import NotLoadedError
from fmedge_converters.rope import freeze_rope
from fmedge_converters.source import Source
from fmedge_converters.streamed_model import StreamedModel, largest_part

Logits = npt.NDArray[np.float32]
RESIDENT_BYTES = 1 << 30
"""A model up to this size in fp32 is loaded whole."""
LOADING = 2
"""transformers holds a model about twice while it loads it."""


class Reference(Protocol):
    """A source that computes logits."""

    how: str
    """How its weights were read, as evidence says it."""

    def each_logits(self, rows: Sequence[Sequence[int]], consume: Callable[[int, Logits], None]) -> None:
        """Hand the logits [S, V] of each row [S] to `consume`, with the number of the row."""
        ...


class ResidentReference:
    """A model in memory."""

    how = "PyTorch in fp32"

    def __init__(self, model: PreTrainedModel, context: int) -> None:
        freeze_rope(model, context)
        self._model = model

    def each_logits(self, rows: Sequence[Sequence[int]], consume: Callable[[int, Logits], None]) -> None:
        """As Reference says."""
        for number, row in enumerate(rows):
            with torch.no_grad(), quiet_libraries():
                logits = self._model(input_ids=torch.tensor([list(row)]), use_cache=False).logits[0]
            consume(number, logits.float().numpy())


class StreamedReference:
    """A model whose layers are read when they run."""

    how = "PyTorch in fp32, layer by layer on weights as fmedge reads them"

    def __init__(self, model: StreamedModel) -> None:
        self._model = model

    def each_logits(self, rows: Sequence[Sequence[int]], consume: Callable[[int, Logits], None]) -> None:
        """As Reference says. Raises SourceError when the model cannot run layer by layer."""
        try:
            with quiet_libraries():
                self._model.run(rows, lambda number, logits: consume(number, logits.float().numpy()))
        except NotLoadedError as error:
            raise SourceError(
                f"PyTorch cannot compute this model layer by layer: a layer uses the weights of another ({error}); use "
                "--verify graph, which checks the architecture only."
            ) from error


@contextmanager
def open_reference(source: Source, parameters: int, context: int) -> Iterator[Reference]:
    """The source in fp32, which has so many parameters, for texts of up to `context` tokens. Raises SourceError."""
    if is_resident(source, parameters):
        yield ResidentReference(load_model(source.folder), context)
        return
    with open_streamed(source, context) as model:
        yield StreamedReference(model)


@contextmanager
def open_streamed(source: Source, context: int) -> Iterator[StreamedModel]:
    """The source in fp32, layer by layer, for texts of up to `context` tokens. Raises SourceError."""
    model = skeleton(source.config)
    freeze_rope(model, context)
    with Checkpoint(source.files, np.dtype(np.float32)) as checkpoint:
        for name, value in checkpoint.buffers(model).items():
            model.get_buffer(name).copy_(value)
        yield StreamedModel(model, checkpoint.weights(model))


def is_resident(source: Source, parameters: int) -> bool:
    """Whether transformers loads the model, which has so many parameters."""
    return source.loads_by_itself and parameters * 4 <= RESIDENT_BYTES


def require_memory(source: Source, parameters: int, bits: int) -> None:
    """Raise SourceError when memory cannot hold the reference beside the bundle, whose weights have `bits` bits."""
    part = parameters * LOADING if is_resident(source, parameters) else largest_part(skeleton(source.config))
    need, free = part * 4 + parameters * max(bits, 8) // 8, available_bytes()
    if free is not None and need > free * 0.9:
        raise SourceError(
            f"comparing with PyTorch needs {need / 1e9:.1f} GB of memory for a layer of the original in fp32 and the "
            f"bundle, {free / 1e9:.1f} GB are free; use --verify graph, which checks the architecture only."
        )


def load_model(folder: Path) -> PreTrainedModel:
    """The source in fp32, as transformers loads it. Raises SourceError."""
    try:
        with quiet_libraries():
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
            )
    except Exception as error:
        raise SourceError(f"{folder}: transformers cannot load the model: {first_line(error)}") from error
    return model.eval()


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """The model without its weights, with transformers' own attention and experts."""
    model = empty_model(config, torch.float32)
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    return model
