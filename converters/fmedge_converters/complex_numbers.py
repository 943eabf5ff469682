"""Complex numbers in a trace. ONNX has none; the exporter writes them as pairs of real numbers [..., 2], but not every
operation on them. While a model is traced, those that only rearrange a complex tensor work on its pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

Rearrange = Callable[..., torch.Tensor]


def _unsqueeze(pairs: torch.Tensor, dim: int) -> torch.Tensor:
    return pairs.unsqueeze(dim if dim >= 0 else dim - 1)


def _getitem(pairs: torch.Tensor, index: Any) -> torch.Tensor:  # noqa: ANN401 - whatever a tensor may be indexed with
    return pairs[index]


REARRANGED: Mapping[object, Rearrange] = {
    torch.unsqueeze: _unsqueeze,
    torch.Tensor.unsqueeze: _unsqueeze,
    torch.Tensor.__getitem__: _getitem,
}


class ComplexAsPairs(TorchFunctionMode):
    """Lets the operations of REARRANGED see complex tensors as pairs of real numbers."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - the result of any torch function
        del types
        if func in REARRANGED and isinstance(args[0], torch.Tensor) and args[0].is_complex():
            return torch.view_as_complex(REARRANGED[func](torch.view_as_real(args[0]), *args[1:], **(kwargs or {})))
        return func(*args, **(kwargs or {}))
