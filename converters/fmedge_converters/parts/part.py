"""What a part of a pipeline is: a module, and the graphs that are made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Tensors = Mapping[str, torch.Tensor]
Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Input:
    """An input of a graph."""

    name: str
    dims: tuple[int | str, ...]
    """Sizes; a string names a dynamic axis."""
    integer: bool = False
    """int64 instead of float32."""
    below: int = 2
    """Integers that the module takes are less than this: ids have a vocabulary, masks are 0 and 1."""
    largest: float | None = None
    """Numbers that the module takes lie between 0 and this; None: they are normally distributed."""


@dataclass(frozen=True, slots=True)
class Call:
    """One way to call a module, which becomes one graph."""

    inputs: tuple[Input, ...]
    run: Callable[[Any, Tensors], dict[str, torch.Tensor]]
    """Calls the module with the inputs; returns the outputs by the names that they have in the graph."""
    multiples: Mapping[str, int] = field(default_factory=dict)
    """Axes whose sizes must be multiples of a number."""
    limits: Mapping[str, int] = field(default_factory=dict)
    """Axes that may not be longer."""
    spread: Mapping[str, tuple[int | str, ...]] = field(default_factory=dict)
    """Inputs with axes of size 1 in the example that may also be as long as those of what they are combined with; and
    what these axes are called in the graph."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What the graphs of a part depend on, beside its module."""

    name: str
    """Of the part in model_index.json."""
    pipeline: str
    """The pipeline's class, which decides what it passes to its parts."""
    residuals: bool = False
    """Whether a UNet is to take the residuals of ControlNets."""


Graphs = Callable[[Any, Asked], dict[str, Call]]
"""The graphs of a module, by the folder each gets in the bundle."""
