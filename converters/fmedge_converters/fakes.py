"""Fake tensors: modules are traced on them, so that no weight need exist."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import onnx_ir as ir
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from fmedge_converters.first_line import first_line


def fake_parameters(module: torch.nn.Module, dtype_of: Callable[[str, torch.nn.Parameter], torch.dtype]) -> None:
    """Replace parameters on the meta device by fake ones on the CPU, keeping those that are tied the same object.

    For use under FakeTensorMode. `dtype_of` gets each parameter and its name.
    """
    fakes: dict[int, torch.nn.Parameter] = {}
    for prefix, owner in module.named_modules():
        for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in fakes:
                kind = dtype_of(f"{prefix}.{name}" if prefix else name, parameter)
                fakes[id(parameter)] = torch.nn.Parameter(torch.empty(parameter.shape, dtype=kind), requires_grad=False)
            owner.register_parameter(name, fakes[id(parameter)])


@contextlib.contextmanager
def unchanged_buffers(module: torch.nn.Module) -> Iterator[None]:
    """Put the buffers back that the module's code replaces: what it computes of them under FakeTensorMode has no
    values, and the next run would read it."""
    before = [(owner, dict(owner.named_buffers(recurse=False, remove_duplicate=False))) for owner in module.modules()]
    try:
        yield
    finally:
        for owner, buffers in before:
            owner._buffers.update(buffers)


def is_fake(model: ir.Model, name: str) -> bool:
    """Whether an initializer of a traced graph is a parameter of its module."""
    raw = getattr(model.graph.initializers[name].const_value, "raw", None)
    return isinstance(raw, torch.nn.Parameter)


def reason(error: BaseException) -> str:
    """The first line of what went wrong at the bottom; the exporter wraps it in advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, DataDependentOutputException | DynamicOutputShapeException):
        return f"its code decides by the values of a tensor what it does next ({error.func}), and a graph cannot"
    name, message = type(error).__name__, first_line(error)
    return message if message.startswith(name) else f"{name}: {message}"


def name_axes(program: torch.onnx.ONNXProgram, inputs: Sequence[Sequence[str | int]]) -> None:
    """Give the dynamic axes of each input, in their order, these names throughout the graph."""
    names: dict[str | ir.SymbolicDim, str] = {}
    for value, dims in zip(program.model.graph.inputs, inputs, strict=True):
        for symbol, name in zip(value.shape or (), dims, strict=True):
            if isinstance(name, str):
                names[str(symbol)] = name
    program.rename_axes(names)
