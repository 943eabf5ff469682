"""What stands in for the kernels of recurrent layers while a model is traced, one file each.

Linear-attention, state-space and convolution layers of transformers call functions that name a kernel of the hub
("chunk_gated_delta_rule", "selective_scan_fn", ...), whose torch form loops over tokens or chunks and has one length.
Those in KERNELS have the signature of that form and record operators that are right for any length.

    with recurrent_kernels(model, states):
        torch.onnx.export(...)
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Iterator, Mapping
from types import FunctionType, ModuleType

import torch

from fmedge_converters.kernels.causal_convolution import causal_convolution
from fmedge_converters.kernels.delta_rule import delta_rule
from fmedge_converters.kernels.selective_scan import selective_scan
from fmedge_converters.kernels.state_space import state_space
from fmedge_converters.kernels.states import Kernel, States

KERNELS: Mapping[str, Kernel] = {
    "causal_conv1d_fn": causal_convolution,
    "chunk_gated_delta_rule": delta_rule,
    "chunk_kda": delta_rule,
    "mamba_chunk_scan_combined": state_space,
    "selective_scan_fn": selective_scan,
}
"""By the name on the hub. The forms for one token ("causal_conv1d_update", ...) are absent: a trace of several tokens
does not reach them."""


@contextlib.contextmanager
def recurrent_kernels(model: torch.nn.Module, states: States) -> Iterator[None]:
    """Put KERNELS in place of the functions that the code of a model's layers calls, and put those back afterwards."""
    replaced: list[tuple[ModuleType, str, object]] = []
    try:
        for module in _modules(model):
            for name, value in list(vars(module).items()):
                kernel = KERNELS.get(kernel_name(value) or "")
                if kernel is not None:
                    replaced.append((module, name, value))
                    setattr(module, name, functools.partial(kernel, states))
        yield
    finally:
        for module, name, value in replaced:
            setattr(module, name, value)


def kernel_name(value: object) -> str | None:
    """The hub's name of a function that transformers' decorator made replaceable, None for anything else."""
    if isinstance(value, FunctionType):
        # Without the `kernels` package the decorator keeps the name in the closure of what it returns, only there.
        name = inspect.getclosurevars(value).nonlocals.get("func_name") if hasattr(value, "__wrapped__") else None
    else:
        name = getattr(value, "kernel_layer_name", None) if isinstance(value, torch.nn.Module) else None
    return name if isinstance(name, str) else None


def _modules(model: torch.nn.Module) -> list[ModuleType]:
    """The Python modules that hold the code of a model's layers and of their base classes."""
    classes = {base for layer in model.modules() for base in type(layer).__mro__}
    return [sys.modules[name] for name in sorted({kind.__module__ for kind in classes}) if name in sys.modules]
