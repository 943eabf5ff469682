"""What a kernel asks of the states that a trace carries."""

from __future__ import annotations

from typing import Any, Protocol

import torch


class States(Protocol):
    """The states of the layer that is being traced.

    transformers' cache joins the columns that a convolution keeps with the new ones, and the kernel sees only the
    result; a selective scan is not given its state at all. Both are asked for here.
    """

    def split(self, joined: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The kept columns [B, C, columns] and the new ones [B, C, S] of what the cache joined; None if it did not."""

    def keep(self, joined: torch.Tensor, columns: torch.Tensor) -> None:
        """Let these be the columns [B, C, K] that are kept after `joined`."""

    def recurrent(self, axes: int) -> torch.Tensor | None:
        """The recurrent state of so many axes [B, ...] that the layer took from the cache; None if it took none.

        A layer with a state of one axis more holds several, stacked behind the batch: each call gives the next.
        """


class Kernel(Protocol):
    """A function that transformers calls, with the states before its own arguments."""

    def __call__(self, states: States, /, *args: Any, **kwargs: Any) -> Any: ...  # noqa: ANN401 - transformers' signatures
