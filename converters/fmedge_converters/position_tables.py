"""Masks that a model keeps as a table over all pairs of positions.

Such a model cuts the rows of its queries out of the table: as many as there are new tokens, the last of the cache. Here
each row of a batch may be anywhere in its cache, so the table is read at the positions of the row's queries instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from fmedge_runtimes.errors import SourceError
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.overrides import TorchFunctionMode

from fmedge_converters.recording import Recording

DIMENSION = ("Squeeze", "Unsqueeze", "Reshape", "Cast", "Identity")
"""Operators through which the trace hands on a dimension."""


class PositionTables(TorchFunctionMode):
    """While it is active, `table[:, ..., first:last, ...]` of a tensor [1, ..., C, ...] gives the rows of the queries,
    [B, ..., S, ...], if first:last are the last S of C."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - the result of any torch function
        """Call a function of torch."""
        del types
        if func is torch.Tensor.__getitem__ and isinstance(args[1], tuple) and args[0].shape[0] == 1:
            axis = next((axis for axis, item in enumerate(args[1]) if self._is_of_queries(item)), 0)
            if axis > 0 and all(isinstance(item, slice) for item in args[1]):
                rest = (*args[1][:axis], slice(None), *args[1][axis + 1 :])
                return self._rows(args[0], axis)[rest]
        return func(*args, **(kwargs or {}))

    def _is_of_queries(self, item: object) -> bool:
        if not isinstance(item, slice) or item.step is not None or item.start is None or item.stop is None:
            return False
        length = self._recording.positions.shape[1]
        # Caches of equal length have symbols of their own until the trace is complete.
        capacities = [key.shape[2] for key, _ in self._recording.past.values()] or [self._recording.capacity]
        return any(_same(item.stop, capacity) and _same(item.start, capacity - length) for capacity in capacities)

    def _rows(self, table: torch.Tensor, axis: int) -> torch.Tensor:
        positions = self._recording.positions  # [B, S]
        rows = table.select(0, 0).index_select(axis - 1, positions.reshape(-1))  # [..., B * S, ...]
        shape = (*rows.shape[: axis - 1], *positions.shape, *rows.shape[axis:])
        return rows.reshape(shape).movedim(axis - 1, 0)  # [B, ..., S, ...]


def _same(found: object, wanted: int | torch.SymInt) -> bool:
    return isinstance(found, int | torch.SymInt) and statically_known_true(found == wanted)


def require_own_positions(model: ir.Model) -> None:
    """Raise SourceError when the graph counts from how long the cache is to where the new tokens are.

    The cache is a buffer, longer than what is in it, and its rows are at positions of their own: the new tokens of a
    step are not the last of the buffer.
    """
    for node in model.graph:
        if node.op_type != "Sub" or node.domain:
            continue
        first, second = (_dimension(value) for value in node.inputs)
        if first == "capacity" and second in ("sequence", 1) and _is_position(node.outputs[0]):
            raise SourceError(
                "the model numbers its tokens by the length of its cache, the same for all rows of a batch, so rows of "
                "unequal length cannot be served together."
            )


def _is_position(value: ir.Value) -> bool:
    """Whether something starts at a scalar: a range, a cut, or a range of which it is the offset."""
    for node, place in value.uses():
        if (node.op_type, place) in (("Range", 0), ("Slice", 1)):
            return True
        if node.op_type == "Add" and any(
            other.shape is None or len(other.shape) for other in node.inputs if other is not None
        ):
            return True
        if node.op_type in DIMENSION and _is_position(node.outputs[0]):
            return True
    return False


def _dimension(value: ir.Value | None) -> str | int | None:
    """The name of the dimension that a scalar of the graph is, or its value; None if it is neither."""
    if value is None:
        return None
    node = value.producer()
    if node is None or node.op_type == "Constant":
        tensor = value.const_value
        return int(tensor.numpy().reshape(-1)[0]) if tensor is not None and tensor.size == 1 else None
    if node.op_type in DIMENSION:
        return _dimension(node.inputs[0])
    shape = node.inputs[0].shape if node.op_type == "Shape" and node.inputs[0] is not None else None
    if shape is None:
        return None
    found = shape[node.attributes.get_int("start", 0)]
    return found if isinstance(found, int) else str(found.value)
