"""Lookups and products with a matrix that is read piece by piece, for parameters on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fmedge_converters.weight import Weight

DEVICE = torch.Tensor.device.__get__


class NotLoadedError(RuntimeError):
    """A parameter was used that has no values yet."""


class Pieces(TorchFunctionMode):
    """While it is active, `embedding` and `linear` with one of these parameters read it.

    Every parameter says that it is on the CPU, where it will be when it is used; one that is used before raises
    NotLoadedError. torch alone may go on with numbers from nowhere: its `embedding` does, on ids that a model has sent
    to the device of a meta parameter.
    """

    def __init__(self, weights: Mapping[torch.Tensor, Weight]) -> None:
        super().__init__()
        self._weights = weights

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - the result of any torch function
        del types
        if func == DEVICE:
            return torch.device("cpu") if args[0].is_meta else args[0].device
        if func is torch.nn.functional.embedding:
            return self._embedding(*args, **(kwargs or {}))
        if func is torch.nn.functional.linear:
            return self._linear(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and any(map(_is_empty, tree_leaves((args, kwargs)))):
            raise NotLoadedError(f"{getattr(func, '__name__', func)} of a parameter without values")
        return result

    def _embedding(self, ids: torch.Tensor, table: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401 - torch's options
        """Rows of a table [V, E] at ids [...]; the options are of training."""
        weight = self._weight(table)
        if weight is None:
            return torch.nn.functional.embedding(ids, table, *args, **kwargs)
        found = sorted(set(ids.flatten().tolist()))
        rows = torch.cat([torch.from_numpy(weight.read(row, row + 1)) for row in found])  # [U, E]
        return rows[torch.searchsorted(torch.tensor(found), ids)]  # [..., E]

    def _linear(self, x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Product of x [..., K] and the transpose of a matrix [N, K], plus a bias [N]."""
        weight = self._weight(matrix)
        if weight is None:
            return torch.nn.functional.linear(x, matrix, bias)
        product: torch.Tensor = _Product.apply(x, weight)  # type: ignore[no-untyped-call]  # torch gives apply no type
        if bias is None:
            return product
        added = self._weight(bias)
        return product.add_(bias if added is None else torch.from_numpy(added.array()))

    def _weight(self, parameter: torch.Tensor) -> Weight | None:
        if not parameter.is_meta:
            return None
        if parameter not in self._weights:
            raise NotLoadedError(
                "a product with, or a lookup in, something that was made of a parameter without values"
            )
        return self._weights[parameter]


class _Product(torch.autograd.Function):
    """x [..., K] times the transpose of a matrix [N, K] that is read piece by piece, there and back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Weight) -> torch.Tensor:  # noqa: ANN401 - torch's
        """As torch.autograd.Function says."""
        ctx.weight = weight
        product = x.new_empty((*x.shape[:-1], weight.shape[0]))  # [..., N]
        for (start, stop), block in zip(weight.ranges(), weight.blocks(), strict=True):
            product[..., start:stop] = torch.nn.functional.linear(x, torch.from_numpy(block))
        return product

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # noqa: ANN401 - torch's
        """As torch.autograd.Function says."""
        weight: Weight = ctx.weight
        back = gradient.new_zeros((*gradient.shape[:-1], weight.shape[1]))  # [..., K]
        for (start, stop), block in zip(weight.ranges(), weight.blocks(), strict=True):
            back += gradient[..., start:stop] @ torch.from_numpy(block)
        return back, None


def _is_empty(item: object) -> bool:
    return isinstance(item, torch.Tensor) and item.is_meta
