"""What goes into the products of a running PyTorch model with its parameters, matrix by matrix.

Products are seen where torch computes them, so it does not matter what modules a model is made of: `linear`, `matmul`
and `addmm` with a parameter, with its transpose, or with one matrix of a stack of them (an expert). Products of the
same input, such as those of q, k and v, share one record.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

MATMULS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm)
ADDMMS = (torch.addmm, torch.Tensor.addmm)


@dataclass(frozen=True, slots=True)
class Place:
    """A matrix of a model: a parameter, or one of those that a parameter of rank 3 holds."""

    parameter: str
    expert: int | None = None


@dataclass(slots=True)
class Inputs:
    """The inputs [T, K] of the products with some matrices, summed over tokens."""

    size: int
    matrices: dict[Place, torch.Tensor | None] = field(default_factory=dict)
    """Each [N, K], a view of the parameter, so that what is written to it is what the model computes with; None where
    only statistics are asked for."""
    tokens: int = 0
    squares: torch.Tensor = field(init=False)  # float64 [K]
    largest: torch.Tensor = field(init=False)  # [K]
    gram: torch.Tensor | None = None  # X.T @ X, [K, K]

    def __post_init__(self) -> None:
        self.squares = torch.zeros(self.size, dtype=torch.float64)
        self.largest = torch.zeros(self.size)

    def add(self, x: torch.Tensor, *, with_gram: bool) -> None:
        """Count inputs [T, K]."""
        if with_gram and self.gram is None:
            self.gram = torch.zeros(self.size, self.size)
        if not len(x):
            return
        x = x.float()
        self.tokens += len(x)
        self.squares += x.square().sum(0)
        self.largest = torch.maximum(self.largest, x.abs().amax(0))
        if self.gram is not None:
            self.gram.addmm_(x.T, x)

    @property
    def mean_square(self) -> torch.Tensor:
        """Of each input feature, [K]."""
        return (self.squares / max(1, self.tokens)).float()


class LinearInputs:
    """Records of the products that run between `watch` and `taken`."""

    def __init__(self, *, with_gram: bool) -> None:
        self._with_gram = with_gram
        self._names: Mapping[int, tuple[str, torch.Tensor]] = {}
        self._found: dict[Place, Inputs] = {}
        self._row: threading.Thread | None = None
        self._current: dict[tuple[object, ...], tuple[Inputs, torch.Tensor]] = {}
        """The inputs of the row that runs, by where they lie; the tensors are held so that no other takes the place."""

    def watch(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Record the products with these, from now on."""
        self._forget_row()
        self._names = {
            value.untyped_storage().data_ptr(): (name, value) for name, value in parameters.items() if value.dim() > 1
        }

    def taken(self) -> list[Inputs]:
        """The records, which end here."""
        self._forget_row()
        found = list({id(inputs): inputs for inputs in self._found.values()}.values())
        self._names, self._found = {}, {}
        return found

    def _forget_row(self) -> None:
        self._row = None
        self._current.clear()

    def mode(self) -> TorchFunctionMode:
        """The context in which products are seen; a model runs in it."""
        return Watching(self._see)

    def _see(self, x: torch.Tensor, matrix: torch.Tensor) -> None:
        """A product of x [..., K] and the transpose of a matrix [N, K]."""
        if not self._names or matrix.is_meta or matrix.dim() != 2:
            return
        name, parameter = self._names.get(matrix.untyped_storage().data_ptr(), ("", matrix))
        if not name or (parameter.dim() == 2 and matrix.numel() != parameter.numel()) or parameter.dim() > 3:
            return
        expert = None
        if parameter.dim() == 3:
            size = parameter.shape[1] * parameter.shape[2]
            expert, rest = divmod(int(matrix.storage_offset() - parameter.storage_offset()), size)
            if rest or matrix.numel() != size:
                return
        place = Place(name, expert)
        if threading.current_thread() is not self._row:  # each row has a thread of its own
            self._forget_row()
            self._row = threading.current_thread()
        # The version, because an input may be changed between two products.
        key = (x.data_ptr(), tuple(x.shape), x.stride(), x._version)
        if key not in self._current:
            inputs = self._found.get(place) or Inputs(x.shape[-1])
            inputs.add(x.detach().reshape(-1, x.shape[-1]), with_gram=self._with_gram)
            self._current[key] = inputs, x
        if place not in self._found:
            inputs = self._current[key][0]
            self._found[place] = inputs
            inputs.matrices[place] = matrix.detach() if self._with_gram else None


class Watching(TorchFunctionMode):
    """A context in which every product of x [..., K] with a matrix [N, K], transposed, is shown to a function."""

    def __init__(self, see: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
        super().__init__()
        self._see = see

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - the result of any torch function
        del types
        if func is torch.nn.functional.linear:
            self._see(args[0], args[1] if len(args) > 1 else (kwargs or {})["weight"])
        elif func in MATMULS and len(args) == 2 and args[1].dim() == 2:
            self._see(args[0], args[1].T)
        elif func in ADDMMS and len(args) == 3 and args[2].dim() == 2:
            self._see(args[1], args[2].T)
        return func(*args, **(kwargs or {}))
