"""A LoRA that stays apart from the weights, so that its scale is an input of the graphs.

Each layer that it changes gets two more, A and B, and gives `layer(x) + scale * B(A(x))`: what PEFT computes. The
weights of the layer itself are quantized as ever, A and B are not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from fmedge_runtimes.errors import SourceError

from fmedge_converters.image_adapter import ImageAdapter, Update
from fmedge_converters.parts.part import Call, Input, Tensors
from fmedge_converters.weight import Array, Weight

SCALE = "adapter_scale"
A, B = "lora_a", "lora_b"
"""Layers that a changed one gets."""


class KeptAdapter:
    """The updates of a LoRA beside the weights; a `part_build.Adapter`."""

    def __init__(self, adapter: ImageAdapter, scale: float) -> None:
        """`adapter` was read with a scale of 1; `scale` is what modules use that are called without one."""
        self._adapter = adapter
        self._scale: torch.Tensor | float = scale
        self._default = scale

    def applied(self, part: str, weights: Mapping[str, Weight]) -> dict[str, Weight]:
        """The weights of a part, and those of A and B. Raises SourceError for an update of what it does not have."""
        found = dict(weights)
        for name, (update, base) in self._adapter.updated(part, weights).items():
            update.merged(base, f"{self._adapter.file}: {name}")  # refuses one of another size
            stem = name.removesuffix(".weight")
            for layer, array in zip((A, B), _layers(update, base.shape), strict=True):
                found[f"{stem}.{layer}.weight"] = _weight(array)
        return found

    def attach(self, part: str, module: torch.nn.Module) -> None:
        """Give the layers of a module that are changed A and B, on the device where the module is.

        Raises SourceError for an update of what is neither a linear layer nor a convolution.
        """
        for name, update in self._adapter.of(part).items():
            layer: Any = _owner(module, name)
            if layer is None or not isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) or _groups(layer) != 1:
                raise SourceError(
                    f"{self._adapter.file} changes {name} of {part}, which is no linear layer or plain convolution; "
                    "merge the LoRA instead (leave --keep-adapter out)."
                )
            device = layer.weight.device
            a, b = (torch.from_numpy(array).to(device) for array in _layers(update, tuple(layer.weight.shape)))
            layer.add_module(A, _like(layer, a, first=True))
            layer.add_module(B, _like(layer, b, first=False))
            layer.register_forward_hook(self._add)

    def merge(self, part: str, module: torch.nn.Module) -> None:
        """The same for a module that is the reference."""
        self.attach(part, module)

    def call(self, part: str, call: Call) -> Call:
        """A call of a part's module, which takes the scale if the LoRA changes the part."""
        if not self._adapter.of(part):
            return call

        def run(model: Any, given: Tensors) -> dict[str, torch.Tensor]:  # noqa: ANN401 - any module
            self._scale = given[SCALE]
            try:
                return call.run(model, {name: value for name, value in given.items() if name != SCALE})
            finally:
                self._scale = self._default

        return replace(call, inputs=(*call.inputs, Input(SCALE, (1,), largest=1.0)), run=run)

    def check_used(self, part: str, parameters: Iterable[str]) -> None:
        """Raise SourceError if a graph lacks one of the part's A and B: a layer's weight is used without the layer."""
        used = set(parameters)
        for name in self._adapter.of(part):
            names = (f"{stem}.{B}.weight" for stem in (name, name.removeprefix("text_model.")))
            if used.isdisjoint(names):
                raise SourceError(
                    f"{self._adapter.file} changes {name} of {part}, whose weight is used in a way that cannot be "
                    "scaled; merge the LoRA instead (leave --keep-adapter out)."
                )

    def _add(self, layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:  # noqa: ANN401 - any layer of torch
        update: torch.Tensor = layer.lora_b(layer.lora_a(inputs[0])) * self._scale
        return output + update


def _layers(update: Update, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """A and B in the form of a weight of that shape: [r, K] and [N, r], or kernels."""
    rank = len(update.a)
    return update.a.reshape(rank, *shape[1:]), (update.b * np.float32(update.scale)).reshape(
        shape[0], rank, *[1] * (len(shape) - 2)
    )


def _weight(array: Array) -> Weight:
    return Weight(array.shape, array.dtype, lambda start, stop: array[start:stop])


def _like(layer: Any, weight: torch.Tensor, *, first: bool) -> torch.nn.Module:  # noqa: ANN401 - two kinds of layers
    """A layer without bias; the first one reads what a convolution reads, the second one is 1 x 1."""
    size: dict[str, Any] = {
        "in_channels": weight.shape[1],
        "out_channels": weight.shape[0],
        "bias": False,
        "device": "meta",
    }
    made: torch.nn.Module
    if isinstance(layer, torch.nn.Linear):
        made = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    elif first:
        made = torch.nn.Conv2d(
            **size,
            kernel_size=layer.kernel_size,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            padding_mode=layer.padding_mode,
        )
    else:
        made = torch.nn.Conv2d(**size, kernel_size=1)
    made.weight = torch.nn.Parameter(weight, requires_grad=False)
    return made


def _owner(module: torch.nn.Module, name: str) -> torch.nn.Module | None:
    names = (name, name.removeprefix("text_model."))
    return next((found for other, found in module.named_modules() if other in names), None)


def _groups(layer: Any) -> int:  # noqa: ANN401 - two kinds of layers
    return int(getattr(layer, "groups", 1))
