"""A torch tensor whose operations are carried out on a `Weight`, so that nothing is read.

transformers turns the tensors of a checkpoint into parameters by operations of its own (stacking experts, cutting a
fused projection, reordering rotary heads, ...). They are written in torch, and below torch's surface they consist of a
handful of operators that move numbers without changing them. Those are done here; the operations themselves, today's
and tomorrow's, run as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fmedge_converters.weight import Array, Weight, concatenated, mapped, permuted, reshaped, selected

aten = torch.ops.aten
Handler = Callable[..., Any]


class NotLazyError(Exception):
    """An operator cannot be carried out piece by piece; its name is the message."""


class LazyTensor(torch.Tensor):
    """A tensor without memory; what is computed from it is lazy too. `weight` reads it."""

    weight: Weight

    @staticmethod
    def __new__(cls: type[LazyTensor], weight: Weight) -> LazyTensor:
        tensor: LazyTensor = torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=torch_dtype(weight.dtype))
        tensor.weight = weight
        return tensor

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it as no class method
        cls,
        function: Any,  # noqa: ANN401 - the signature is torch's
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - the result of any operator
        """Carry out an operator. Raises NotLazyError, or ValueError when the shapes do not fit."""
        handler = HANDLERS.get(function)
        if handler is None and torch.Tag.pointwise in function.tags and not kwargs:
            return _pointwise(function, args)
        if handler is None:
            raise NotLazyError(str(function))
        return handler(*args, **(kwargs or {}))


@functools.cache
def torch_dtype(dtype: np.dtype[np.generic]) -> torch.dtype:
    """The torch spelling of a numpy dtype."""
    return torch.from_numpy(np.empty(0, dtype)).dtype


def _pointwise(function: Any, args: tuple[Any, ...]) -> LazyTensor:  # noqa: ANN401 - an operator of torch
    """An operator that treats each number alone: applied to the rows as they are read."""
    lazy = [item for item in args if isinstance(item, LazyTensor)]
    if any(isinstance(item, torch.Tensor) and not isinstance(item, LazyTensor) for item in args):
        raise NotLazyError(str(function))

    def apply(*rows: Array) -> Array:
        supply = iter(torch.from_numpy(row) for row in rows)
        result: Array = function(*(next(supply) if isinstance(item, LazyTensor) else item for item in args)).numpy()
        return result

    kind = apply(*(np.ones(1, item.weight.dtype) for item in lazy)).dtype
    return LazyTensor(mapped(apply, [item.weight for item in lazy], kind))


def _same(tensor: LazyTensor, **_layout: object) -> LazyTensor:
    return LazyTensor(tensor.weight)


def _to(tensor: LazyTensor, *, dtype: torch.dtype | None = None, **_layout: object) -> LazyTensor:
    kind = tensor.dtype if dtype is None else dtype
    if kind == torch.bfloat16:
        raise NotLazyError("conversion to bfloat16")
    made = np.dtype(torch.empty(0, dtype=kind).numpy().dtype)
    return LazyTensor(mapped(lambda rows: rows.astype(made), [tensor.weight], made))


def _axis(axis: int, rank: int) -> int:
    return axis + rank if axis < 0 else axis


def _cat(tensors: Sequence[LazyTensor], axis: int = 0) -> LazyTensor:
    return LazyTensor(concatenated([tensor.weight for tensor in tensors], _axis(axis, tensors[0].dim())))


def _stack(tensors: Sequence[LazyTensor], axis: int = 0) -> LazyTensor:
    place = _axis(axis, tensors[0].dim() + 1)
    return _cat([_unsqueeze(tensor, place) for tensor in tensors], place)


def _permute(tensor: LazyTensor, axes: Sequence[int]) -> LazyTensor:
    return LazyTensor(permuted(tensor.weight, [_axis(axis, tensor.dim()) for axis in axes]))


def _transpose(tensor: LazyTensor, first: int, second: int) -> LazyTensor:
    axes = list(range(tensor.dim()))
    axes[first], axes[second] = axes[second], axes[first]
    return _permute(tensor, axes)


def _matrix_transpose(tensor: LazyTensor) -> LazyTensor:
    return _permute(tensor, list(range(tensor.dim()))[::-1])


def _view(tensor: LazyTensor, shape: Sequence[int]) -> LazyTensor:
    known = int(np.prod([size for size in shape if size != -1], dtype=np.int64))
    sizes = [tensor.numel() // max(1, known) if size == -1 else size for size in shape]
    return LazyTensor(reshaped(tensor.weight, sizes))


def _unsqueeze(tensor: LazyTensor, axis: int) -> LazyTensor:
    shape = list(tensor.shape)
    shape.insert(_axis(axis, tensor.dim() + 1), 1)
    return _view(tensor, shape)


def _squeeze(tensor: LazyTensor, axes: int | Sequence[int] | None = None) -> LazyTensor:
    given = range(tensor.dim()) if axes is None else [axes] if isinstance(axes, int) else axes
    dropped = {_axis(axis, tensor.dim()) for axis in given if tensor.shape[axis] == 1}
    return _view(tensor, [size for axis, size in enumerate(tensor.shape) if axis not in dropped])


def _take(tensor: LazyTensor, axis: int, indices: Array) -> LazyTensor:
    return LazyTensor(selected(tensor.weight, _axis(axis, tensor.dim()), indices))


def _slice(
    tensor: LazyTensor, axis: int = 0, start: int | None = None, stop: int | None = None, step: int = 1
) -> LazyTensor:
    return _take(tensor, axis, np.arange(tensor.shape[axis])[start:stop:step])


def _select(tensor: LazyTensor, axis: int, index: int) -> LazyTensor:
    return _squeeze(_take(tensor, axis, np.arange(tensor.shape[axis])[[index]]), axis)


def _split_sizes(tensor: LazyTensor, sizes: Sequence[int], axis: int = 0) -> list[LazyTensor]:
    ends = np.cumsum(sizes).tolist()
    if sum(sizes) != tensor.shape[axis]:
        raise ValueError(f"parts of {list(sizes)} do not make up the {tensor.shape[axis]} of axis {axis}")
    return [_slice(tensor, axis, end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _split(tensor: LazyTensor, size: int, axis: int = 0) -> list[LazyTensor]:
    whole = tensor.shape[axis]
    return [_slice(tensor, axis, start, start + size) for start in range(0, max(whole, 1), max(size, 1))]


def _unbind(tensor: LazyTensor, axis: int = 0) -> list[LazyTensor]:
    return [_select(tensor, axis, index) for index in range(tensor.shape[axis])]


def _flip(tensor: LazyTensor, axes: Sequence[int]) -> LazyTensor:
    for axis in axes:
        tensor = _take(tensor, axis, np.arange(tensor.shape[axis])[::-1])
    return tensor


def _index_select(tensor: LazyTensor, axis: int, indices: torch.Tensor) -> LazyTensor:
    return _take(tensor, axis, indices.numpy())


def _index(tensor: LazyTensor, indices: Sequence[torch.Tensor | None]) -> LazyTensor:
    given = [(axis, item) for axis, item in enumerate(indices) if item is not None]
    if len(given) != 1 or given[0][1].dim() != 1 or given[0][1].dtype == torch.bool:
        raise NotLazyError("indexing by several tensors or by a mask")
    return _index_select(tensor, *given[0])


HANDLERS: dict[Any, Handler] = {
    aten.alias.default: _same,
    aten.detach.default: _same,
    aten.clone.default: _same,
    aten._to_copy.default: _to,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.t.default: _matrix_transpose,
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.default: _squeeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split_sizes,
    aten.unbind.int: _unbind,
    aten.flip.default: _flip,
    aten.index_select.default: _index_select,
    aten.index.Tensor: _index,
}
