"""A source that calibration text runs through, layer by layer in PyTorch, as the comparison of an export does it."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from fmedge_runtimes.errors import SourceError
from fmedge_runtimes.memory import available_bytes
from transformers import PretrainedConfig, PreTrainedModel

from fmedge_converters.calibration.linear_inputs import Inputs, LinearInputs
from fmedge_converters.checkpoint import Checkpoint, Files
from fmedge_converters.decoder import quiet_libraries
from fmedge_converters.pieces import NotLoadedError
from fmedge_converters.reference import skeleton
from fmedge_converters.rope import freeze_rope
from fmedge_converters.streamed_model import StreamedModel, Visitor, largest_part
from fmedge_converters.weight import Weight, weight_from_array

STATES = 2
"""Copies of a row's hidden states that a layer holds while it runs, about."""

Fit = Callable[[list[Inputs], Mapping[str, torch.Tensor]], None]
"""Takes the inputs of a layer's matrices, and the layer's parameters by name; may write to the matrices what the layer
is to compute with."""


@dataclass(frozen=True, slots=True)
class CalibrationModel:
    """A source, and the rows of token ids that run through it."""

    config: PretrainedConfig
    files: Files
    context: int
    rows: Sequence[Sequence[int]]

    @property
    def tokens(self) -> int:
        """Of all rows."""
        return sum(map(len, self.rows))

    def statistics(self, progress: Callable[[int, int], None]) -> list[Inputs]:
        """The inputs of all matrices in all layers, without Gram matrices. `progress` gets layers done and in all.

        Raises SourceError when the model cannot run layer by layer.
        """
        found: list[Inputs] = []
        inputs = LinearInputs(with_gram=False)
        with self._opened(with_gram=False) as opened:

            def look(parameters: Mapping[str, torch.nn.Parameter], rehearse: Callable[[], None]) -> None:
                del rehearse  # what goes through a layer as it is is all that is looked at
                found.extend(inputs.taken())
                progress(opened.passed(), opened.layers)
                inputs.watch(opened.own_names(parameters))

            opened.visit(self.rows, inputs, look)
        return found + inputs.taken()

    def fit(self, fit: Fit, progress: Callable[[int, int], None], head: Inputs | None = None) -> None:
        """Hand the inputs of each layer's matrices, with their Gram matrices, to `fit`, layer after layer; what it
        writes to the matrices is what the text goes through to reach the next layer. `head` gets what reaches the head
        behind all of them.

        Raises SourceError when the model cannot run layer by layer, and what `fit` raises.
        """
        inputs = LinearInputs(with_gram=True)
        with self._opened(with_gram=True) as opened:

            def visit(parameters: Mapping[str, torch.nn.Parameter], rehearse: Callable[[], None]) -> None:
                progress(opened.passed(), opened.layers)
                own = opened.own_names(parameters)
                inputs.watch(own)
                rehearse()
                fit(inputs.taken(), own)
                opened.keep_shared(parameters)

            opened.visit(self.rows, inputs, visit, head)

    @contextmanager
    def _opened(self, *, with_gram: bool) -> Iterator[_Opened]:
        model = skeleton(self.config)
        self._require_memory(model, with_gram=with_gram)
        freeze_rope(model, self.context)
        with Checkpoint(self.files, np.dtype(np.float32)) as checkpoint:
            for name, value in checkpoint.buffers(model).items():
                model.get_buffer(name).copy_(value)
            yield _Opened(model, checkpoint.weights(model))

    def _require_memory(self, model: PreTrainedModel, *, with_gram: bool) -> None:
        """Raise SourceError when memory cannot hold a layer and what goes into it."""
        # Gram matrices take about as much as the matrices that they belong to, and their factors once more.
        layer = largest_part(model) * (3 if with_gram else 1)
        states = self.tokens * model.get_input_embeddings().weight.shape[-1] * STATES
        need, free = (layer + states) * 4, available_bytes()
        if free is not None and need > free * 0.9:
            raise SourceError(
                f"calibrating needs about {need / 1e9:.1f} GB of memory for a layer in fp32 and the states of "
                f"{self.tokens} tokens, {free / 1e9:.1f} GB are free; use fewer --calibrate-tokens, or no text."
            )


class _Opened:
    """The model while its checkpoint is open."""

    def __init__(self, model: PreTrainedModel, weights: Mapping[str, Weight]) -> None:
        self._changed: dict[str, Weight] = {}
        by_identity: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            by_identity.setdefault(id(parameter), []).append(name)
        self._names = {name: names for names in by_identity.values() for name in names}
        self._streamed = StreamedModel(model, ChainMap(self._changed, dict(weights)))
        self.layers = self._streamed.layers
        self._begun = 0

    def visit(
        self,
        rows: Sequence[Sequence[int]],
        inputs: LinearInputs,
        visitor: Visitor,
        head: Inputs | None = None,
    ) -> None:
        take = None if head is None else lambda x: head.add(x.detach().flatten(0, -2), with_gram=True)
        try:
            with quiet_libraries():
                self._streamed.visit(rows, inputs.mode, visitor, take)
        except NotLoadedError as error:
            raise SourceError(
                f"PyTorch cannot compute this model layer by layer: a layer uses the weights of another ({error}); its "
                "weights can only be rounded without calibration text."
            ) from error

    def passed(self) -> int:
        """Layers that have run; counts one more with every call."""
        self._begun += 1
        return min(self._begun - 1, self.layers)

    def own_names(self, parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, torch.nn.Parameter]:
        """Parameters by the first of the names that they have."""
        return {self._names[name][0]: parameter for name, parameter in parameters.items()}

    def keep_shared(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        """Let other layers with the same parameters read them as they are now."""
        for name, parameter in parameters.items():
            if len(self._names[name]) > 1:
                weight = weight_from_array(parameter.detach().numpy().copy())
                self._changed.update(dict.fromkeys(self._names[name], weight))
