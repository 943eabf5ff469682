"""The arguments with which a decoder's step is traced: example tensors, and which of their axes are dynamic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fmedge_converters.dialects.dialect import Dialect
from fmedge_converters.recording import PROBE_CAPACITY, LayerCache
from fmedge_converters.step_layout import Layout

# Sizes of 0 and 1, and equal sizes, would be taken for constants; these are all different.
SIZES = {"batch": 3, "sequence": 5, "logits": 4}


@dataclass(frozen=True, slots=True)
class Example:
    """The arguments of a step as it is traced, and what its tensors and axes are called."""

    arguments: tuple[Any, ...]
    dynamic_shapes: tuple[Any, ...]
    axes: Sequence[Sequence[str | int]]
    """Of each tensor of the arguments; a name is a dynamic axis."""
    input_names: Sequence[str]
    output_names: Sequence[str]


def example_step(dialect: Dialect, layout: Layout, dtype: torch.dtype) -> Example:
    """The arguments for a model of that layout."""
    sizes = {**SIZES, "sequence": 1} if layout.one_token else dict(SIZES)
    for cache in layout.caches:
        if cache.capacity is None:
            sizes.setdefault(capacity_axis(cache), PROBE_CAPACITY + len(sizes))
    axes = {name: torch.export.Dim(name) for name in sizes}

    def example(kind: torch.dtype, *dims: str | int) -> torch.Tensor:
        return torch.zeros([sizes[dim] if isinstance(dim, str) else dim for dim in dims], dtype=kind)

    def dynamic(*dims: str | int) -> dict[int, Any]:
        return {index: axes[dim] for index, dim in enumerate(dims) if isinstance(dim, str)}

    ids: tuple[str | int, ...] = ("batch", 1 if layout.one_token else "sequence")
    shapes: list[tuple[tuple[str | int, ...], ...]] = [
        tuple(
            ("batch", cache.kv_heads, cache.capacity or capacity_axis(cache), size)
            for size in (cache.key_dim, cache.value_dim)
        )
        for cache in layout.caches
    ]
    kept: list[tuple[str | int, ...]] = [("batch", *state.shape) for state in layout.states]
    cache_names = [f"{{}}.{cache.layer}.{part}" for cache in layout.caches for part in ("key", "value")]
    return Example(
        arguments=(
            example(torch.int64, *ids),
            example(torch.int64, *ids),
            example(torch.int64, "logits"),
            {item.name: example(item.dtype, *item.axes) for item in dialect.step_inputs},
            [tuple(example(dtype, *shape) for shape in pair) for pair in shapes],
            [example(state.dtype, *shape) for state, shape in zip(layout.states, kept, strict=True)],
        ),
        dynamic_shapes=(
            dynamic(*ids),
            dynamic(*ids),
            dynamic("logits"),
            {item.name: dynamic(*item.axes) for item in dialect.step_inputs},
            [tuple(dynamic(*shape) for shape in pair) for pair in shapes],
            [dynamic(*shape) for shape in kept],
        ),
        axes=[
            ids,
            ids,
            ("logits",),
            *(item.axes for item in dialect.step_inputs),
            *(shape for pair in shapes for shape in pair),
            *kept,
        ],
        input_names=[
            "input_ids",
            "position_ids",
            "logits_indices",
            *(item.name for item in dialect.step_inputs),
            *(name.format("past_key_values") for name in cache_names),
            *(f"past_states.{state.name}" for state in layout.states),
        ],
        output_names=[
            "logits",
            *(name.format("present") for name in cache_names),
            *(f"present_states.{state.name}" for state in layout.states),
        ],
    )


def capacity_axis(cache: LayerCache) -> str:
    """The name of the axis of a cache's tokens; windows have buffers of their own length."""
    return f"capacity_{cache.window}" if cache.rolling else "capacity"
