"""What each way to round a matrix costs a decoder, before anything is rounded.

To second order, the KL divergence that a change d of a weight causes is F d d / 2, where F, its Fisher information, is
the mean square of the gradient of -log p(y) for tokens y drawn from the model's own distribution (LeCun, Denker and
Solla, "Optimal brain damage", 1990; Kim et al., "SqueezeLLM", 2023). One pass over the layers and back finds it: in a
matrix, F is the sum over tokens of squared inputs times squared gradients of outputs. Changes of different weights add
up, so the estimate for several matrices is a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from transformers.pytorch_utils import Conv1D

from fmedge_converters.rounding import Cost, Rounding, round_blocks
from fmedge_converters.streamed_model import StreamedModel, Visit
from fmedge_converters.weight import Array, Weight, transposed

TOKENS = 1024
WINDOW = 256
"""Tokens of text in all, and of a row."""
LOGITS_BYTES = 512 << 20
"""Fewer tokens are used when their logits would take more than this in fp32."""
SEED = 0
"""For the tokens that are drawn."""


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What was measured of one matrix [N, K]."""

    importance: Array
    """float32 [K]: mean square of its input features."""
    costs: tuple[Cost, ...]
    """One for each rounding."""


@dataclass(frozen=True, slots=True)
class Sensitivities:
    """What was measured of a decoder's matrices, by the names of their parameters."""

    tokens: int
    matrices: Mapping[str, Sensitivity]

    def attach(self, weights: dict[str, Weight]) -> dict[str, Weight]:
        """The weights with what was measured."""
        return {
            name: replace(weight, importance=found.importance, costs=found.costs)
            if (found := self.matrices.get(name)) is not None
            else weight
            for name, weight in weights.items()
        }


def measure_sensitivities(
    streamed: StreamedModel,
    text: Sequence[int],
    roundings: Sequence[Rounding],
    progress: Callable[[int, int], None],
) -> Sensitivities:
    """Run a model over the first tokens of a text, and back. `progress` gets matrices done and in all.

    Raises NotLoadedError when a layer uses the weights of another.
    """
    vocabulary = streamed.model.get_output_embeddings().weight.shape[0]
    window = min(WINDOW, len(text))
    most = max(1, min(TOKENS, LOGITS_BYTES // (4 * vocabulary)) // window)
    ends = range(0, min(len(text), most * window) + 1, window)
    rows = torch.tensor([list(text[start:end]) for start, end in pairwise(ends)])  # [B, S]
    modules = {
        f"{name}.weight": module
        for name, module in streamed.model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and f"{name}.weight" in streamed.weights
    }
    measured: dict[str, _Matrix] = {}
    visits: dict[torch.nn.Module, Visit] = {}
    for name, module in modules.items():
        weight = streamed.weights[name]
        measured[name] = _Matrix(transposed(weight) if isinstance(module, Conv1D) else weight, roundings, rows.numel())

        def visit(x: torch.Tensor, gradient: torch.Tensor, matrix: _Matrix = measured[name]) -> None:
            matrix.visit(x.flatten(0, -2), gradient.flatten(0, -2))
            progress(sum(other.tokens > 0 for other in measured.values()), len(measured))

        visits[module] = visit
    streamed.run_back(rows, _towards_own_tokens, visits)
    return Sensitivities(rows.numel(), {name: matrix.result() for name, matrix in measured.items() if matrix.tokens})


def _towards_own_tokens(logits: torch.Tensor) -> torch.Tensor:
    """The gradient of -log p(y) by the logits [B, S, V], for tokens y drawn from p."""
    generator = torch.Generator().manual_seed(SEED)
    gradient = logits.float().softmax(-1).flatten(0, -2)  # [B * S, V]
    drawn = torch.multinomial(gradient, 1, generator=generator)  # [B * S, 1]
    gradient.scatter_add_(1, drawn, torch.full_like(drawn, -1.0, dtype=gradient.dtype))
    return gradient.view_as(logits).to(logits.dtype)


class _Matrix:
    """A matrix [N, K], while what its roundings cost is added up."""

    def __init__(self, weight: Weight, roundings: Sequence[Rounding], tokens: int) -> None:
        self.tokens = 0
        """That it has seen; an expert sees some."""
        self._weight = weight
        self._all_tokens = tokens
        self._squares = torch.zeros(weight.shape[1])  # [K]
        self._costs = dict.fromkeys(roundings, 0.0)

    def visit(self, x: torch.Tensor, gradient: torch.Tensor) -> None:
        """Add what inputs [T, K] and gradients of outputs [T, N] say."""
        inputs, outputs = x.square(), gradient.square()
        self.tokens += len(x)
        self._squares += inputs.sum(0)
        importance = self._squares / self.tokens
        for (start, stop), block in zip(self._weight.ranges(), self._weight.blocks(), strict=True):
            rows = torch.from_numpy(block)  # [n, K]
            fisher = outputs[:, start:stop].T @ inputs  # [n, K]
            for rounding in self._costs:
                change = round_blocks(rows, rounding, importance, torch.bfloat16).dequantized(rows.shape[1]) - rows
                total = (change.square_() * fisher).sum(dtype=torch.float64)
                self._costs[rounding] += float(total) / (2 * self._all_tokens)

    def result(self) -> Sensitivity:
        """What was found."""
        importance = (self._squares / self.tokens).numpy()
        return Sensitivity(importance, tuple(Cost(rounding, cost) for rounding, cost in self._costs.items()))
