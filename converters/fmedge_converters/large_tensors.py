"""Keep large tensors from being allocated while a model is built for its shapes only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

LARGE = 1 << 24
"""Elements. No buffer of a decoder is as large; the experts of one layer are many times that."""


class LargeOnMeta(TorchFunctionMode):
    """Makes `torch.empty` and `torch.zeros` of LARGE elements or more on the meta device.

    accelerate's init_empty_weights moves parameters there after they were made, and the system may refuse to make
    tens of gigabytes of experts even if nobody touches them.
    """

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - the signature is torch's
        """Call a function of torch."""
        keywords = dict(kwargs or {})
        if function in (torch.empty, torch.zeros) and keywords.get("device") is None:
            with torch.device("meta"):
                shaped = function(*args, **keywords)
            if shaped.numel() >= LARGE:
                return shaped
        return function(*args, **keywords)
