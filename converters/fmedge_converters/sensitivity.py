"""What each way to round a matrix costs a decoder, before anything is rounded.

To second order, the KL divergence that a change d of a weight causes is F d d / 2, where F, its Fisher information, is
the mean square of the gradient of -log p(y) for tokens y drawn from the model's own distribution (LeCun, Denker and
Solla, "Optimal brain damage", 1990; Kim et al., "SqueezeLLM", 2023). One pass over the layers and back finds it: in a
matrix, F is the sum over tokens of squared inputs times squared gradients of outputs. Changes of different weights add
up, so the estimate for several matrices is a sum. Of the token embedding only the rows that were looked up count; one
that is the head's, too, costs what both together do.
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
    lookups: Array
    """float32 [E, E]: Gram matrix of the gradients of looked up embeddings, in the measure of the head's inputs. What
    an error in the row of a token costs where it is read is to this matrix as what it costs where it is predicted is to
    the Gram matrix of the head's inputs, because tokens are read as often as they are predicted."""

    def attach(self, weights: dict[str, Weight]) -> dict[str, Weight]:
        """The weights with what was measured; a tied one stays one."""
        known = {
            id(weights[name]): replace(weights[name], importance=found.importance, costs=found.costs)
            for name, found in self.matrices.items()
            if name in weights
        }
        return {name: known.get(id(weight), weight) for name, weight in weights.items()}


def measure_sensitivities(
    streamed: StreamedModel,
    text: Sequence[int],
    roundings: Sequence[Rounding],
    progress: Callable[[int, int], None],
) -> Sensitivities:
    """Run a model over the first tokens of a text, and back. `progress` gets matrices done and in all.

    Raises NotLoadedError when a layer uses the weights of another.
    """
    model = streamed.model
    vocabulary = model.get_output_embeddings().weight.shape[0]
    window = min(WINDOW, len(text))
    most = max(1, min(TOKENS, LOGITS_BYTES // (4 * vocabulary)) // window)
    ends = range(0, min(len(text), most * window) + 1, window)
    rows = torch.tensor([list(text[start:end]) for start, end in pairwise(ends)])  # [B, S]
    modules = {
        f"{name}.weight": module
        for name, module in model.named_modules()
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
    names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    head = measured.get(names[id(model.get_output_embeddings())])
    looked_up = names[id(model.get_input_embeddings())]
    tied = head is not None and streamed.weights[looked_up] is head.weight
    table = _Table(streamed.weights[looked_up], roundings, head, tied=tied)
    streamed.run_back(rows, _towards_own_tokens, visits, table.visit)
    found = {name: matrix.result(with_rows=matrix is head) for name, matrix in measured.items() if matrix.tokens}
    if not tied:
        found[looked_up] = table.result()
    return Sensitivities(rows.numel(), found, table.gram.numpy())


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
        self.weight = weight
        self.costs = {rounding: torch.zeros(weight.shape[0]) for rounding in roundings}
        """Of each row, [N]."""
        self.reach = 0.0
        """Mean over tokens of the square of the gradient of the outputs."""
        self._all_tokens = tokens
        self._squares = torch.zeros(weight.shape[1])  # [K]

    @property
    def importance(self) -> torch.Tensor:
        """Mean square of each input feature, [K]."""
        return self._squares / max(1, self.tokens)

    def visit(self, x: torch.Tensor, gradient: torch.Tensor) -> None:
        """Add what inputs [T, K] and gradients of outputs [T, N] say."""
        inputs, outputs = x.square(), gradient.square()
        self.tokens += len(x)
        self.reach += float(outputs.sum(dtype=torch.float64)) / self._all_tokens
        self._squares += inputs.sum(0)
        if not self.costs:
            return
        for (start, stop), block in zip(self.weight.ranges(), self.weight.blocks(), strict=True):
            rows = torch.from_numpy(block)  # [n, K]
            fisher = outputs[:, start:stop].T @ inputs  # [n, K]
            for rounding in self.costs:
                change = round_blocks(rows, rounding, self.importance, torch.bfloat16).dequantized(rows.shape[1]) - rows
                self.costs[rounding][start:stop] += (change.square_() * fisher).sum(1) / (2 * self._all_tokens)

    def result(self, *, with_rows: bool) -> Sensitivity:
        """What was found."""
        return Sensitivity(self.importance.numpy(), _costs(self.costs, with_rows=with_rows))


class _Table:
    """The token embedding [V, E], while what its roundings cost is added up: to the costs of the head if both are
    tied."""

    def __init__(self, weight: Weight, roundings: Sequence[Rounding], head: _Matrix | None, *, tied: bool) -> None:
        self.gram = torch.zeros(weight.shape[1], weight.shape[1])
        """As Sensitivities has it."""
        self._weight = weight
        self._head = head
        self._tied = tied
        own = {rounding: torch.zeros(weight.shape[0]) for rounding in roundings}
        self._costs = head.costs if head is not None and tied else own

    def visit(self, ids: torch.Tensor, embeddings: torch.Tensor, gradient: torch.Tensor) -> None:
        """Add what the gradients [B, S, E] of looked up embeddings say."""
        numbers = sorted(set(ids.flatten().tolist()))
        found = torch.tensor(numbers)  # [U]
        places = torch.searchsorted(found, ids.flatten())  # [T]
        rows = torch.cat([torch.from_numpy(self._weight.read(row, row + 1)) for row in numbers]).float()  # [U, E]
        plain, given = rows[places], embeddings.flatten(0, -2)  # [T, E]
        # Some models multiply what they look up.
        factor = (plain * given).sum() / plain.square().sum().clamp(min=torch.finfo(torch.float32).tiny)
        back = gradient.flatten(0, -2) * factor  # [T, E]
        reach = 1.0 if self._head is None else max(self._head.reach, torch.finfo(torch.float32).tiny)
        self.gram += back.T @ back / (len(back) * reach)
        fisher = torch.zeros_like(rows).index_add_(0, places, back.square())  # [U, E]
        importance = self._importance()
        for rounding in self._costs:
            change = round_blocks(rows, rounding, importance, torch.bfloat16).dequantized(rows.shape[1]) - rows
            self._costs[rounding].index_add_(0, found, (change.square_() * fisher).sum(1) / (2 * len(back)))

    def _importance(self) -> torch.Tensor:
        own = self.gram.diagonal()
        return own + self._head.importance if self._head is not None and self._tied else own

    def result(self) -> Sensitivity:
        """What was found of an embedding by itself."""
        return Sensitivity(self._importance().numpy(), _costs(self._costs, with_rows=False))


def _costs(rows: Mapping[Rounding, torch.Tensor], *, with_rows: bool) -> tuple[Cost, ...]:
    return tuple(
        Cost(rounding, float(found.sum(dtype=torch.float64)), found if with_rows else None)
        for rounding, found in rows.items()
    )
