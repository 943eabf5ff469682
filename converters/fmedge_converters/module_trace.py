"""Trace a module of diffusers or transformers into ONNX, without its weights.

    traced = trace_module(module, call, torch.float32, "unet", ORT_OPERATORS)
    traced.model        # the ONNX graph; its weights are named, but have no values

The module lies on the meta device; it is called as its pipeline calls it (parts/), on fake tensors, by
`torch.onnx.export`. Nothing here knows a class.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from fmedge_runtimes.errors import SourceError
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

from fmedge_converters.complex_numbers import ComplexAsPairs
from fmedge_converters.decoder import quiet_libraries
from fmedge_converters.exported_program import Names, to_onnx
from fmedge_converters.fakes import fake_parameters, is_fake, name_axes, reason
from fmedge_converters.fused_operators import FusedOperators, PartOperators
from fmedge_converters.parts.part import Call, Input

SIZES = {"batch": 3, "sequence": 5, "height": 23, "width": 19, "image_sequence": 14}
"""Of dynamic axes. Not 0 or 1, not equal, odd, and large enough for five levels of a UNet: sizes that are special, or
become so when they are halved, would be traced as such."""


@dataclass(frozen=True, slots=True)
class TracedModule:
    """A module as a graph, before its weights are bound."""

    model: ir.Model
    parameters: Mapping[str, str]
    """Name of each initializer that is a parameter, and the parameter's name in the module."""
    dtypes: Mapping[str, torch.dtype]
    """Of each parameter, by its name in the module."""
    outputs: tuple[str, ...]
    """Names for the graph's outputs, to be given by `name_values` when it has been rewritten."""


class _Called(torch.nn.Module):
    """A module behind the names of its graph's inputs; floats go in and come out as float32."""

    def __init__(
        self,
        module: torch.nn.Module,
        call: Call,
        dtype: torch.dtype,
        operators: PartOperators,
        name_outputs: Callable[[Iterable[str]], None],
    ) -> None:
        super().__init__()
        self.module = module
        self.call = call
        self.dtype = dtype
        self.operators = operators
        # The exporter puts attributes back as they were.
        self.name_outputs = name_outputs

    def forward(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        with FusedOperators(self.operators), ComplexAsPairs():
            given = {
                name: _cast(value, torch.float32 if name == "timestep" else self.dtype)
                for name, value in inputs.items()
            }
            outputs = self.call.run(self.module, given)
        self.name_outputs(outputs)
        return tuple(_cast(value, torch.float32) for value in outputs.values())


def _cast(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Floats in that type; the exporter keeps casts that change nothing."""
    return value.to(dtype) if value.is_floating_point() and value.dtype != dtype else value


def example_sizes(call: Call) -> dict[str, int]:
    """A size for every dynamic axis of a call."""
    return {axis: size * call.multiples.get(axis, 1) for axis, size in SIZES.items()}


def _example(item: Input, sizes: Mapping[str, int]) -> torch.Tensor:
    shape = [sizes[dim] if isinstance(dim, str) else dim for dim in item.dims]
    return torch.zeros(shape, dtype=torch.int64 if item.integer else torch.float32)


def trace_module(
    module: torch.nn.Module, call: Call, dtype: torch.dtype, where: str, operators: PartOperators
) -> TracedModule:
    """Trace one call of a module whose parameters are on the meta device.

    `dtype` is that of what is computed; parameters that the module's class wants in fp32 stay so. `operators` spell
    attention and group norms. Buffers become constants of the graph. Raises SourceError, which names the part
    (`where`), when it cannot be traced.
    """
    kept = tuple(getattr(module, "_keep_in_fp32_modules", None) or ())

    def dtype_of(name: str, parameter: torch.nn.Parameter) -> torch.dtype:
        if not parameter.dtype.is_floating_point:
            return parameter.dtype
        return torch.float32 if any(part in name.split(".") for part in kept) else dtype

    with quiet_libraries(), contextlib.ExitStack() as stack:
        try:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            fake_parameters(module, dtype_of)
            names: dict[str, None] = {}
            called = _Called(module, call, dtype, operators, lambda found: names.update(dict.fromkeys(found)))
            program = _export(called, call)
        except Exception as error:
            raise SourceError(f"{where} cannot be traced: {reason(error)}") from error
    model = program.model
    _require_dynamic(model, call, where)
    parameters = {name: name.removeprefix("module.") for name in model.graph.initializers if is_fake(model, name)}
    dtypes = {name: value.dtype for name, value in module.named_parameters(remove_duplicate=False)}
    return TracedModule(model, parameters, dtypes, tuple(names))


def _export(called: _Called, call: Call) -> torch.onnx.ONNXProgram:
    sizes = example_sizes(call)
    example = {item.name: _example(item, sizes) for item in call.inputs}
    axes: dict[str, Any] = {
        # A multiple of a symbol where halves are doubled again: only then is the result known to be of the same size.
        axis: Dim.DYNAMIC if call.multiples.get(axis, 1) == 1 else call.multiples[axis] * Dim(f"part_of_{axis}")
        for axis in SIZES
    }
    dynamic = {
        item.name: {index: axes[dim] for index, dim in enumerate(item.dims) if isinstance(dim, str)}
        for item in call.inputs
    }
    with torch.no_grad():
        program = to_onnx(called, (example,), (dynamic,), called.operators.opset, Names([*example]))
    name_axes(program, [item.dims for item in call.inputs])
    return program


def _require_dynamic(model: ir.Model, call: Call, where: str) -> None:
    for value, item in zip(model.graph.inputs, call.inputs, strict=True):
        for dim, axis in zip(value.shape or (), item.dims, strict=True):
            if isinstance(axis, str) and isinstance(dim, int):
                raise SourceError(
                    f"{where}: its code fixes the {axis} of {item.name} to {dim}, so the graph would serve one."
                )


def name_values(graph: ir.Graph, call: Call, names: Sequence[str]) -> None:
    """Name the axes of a graph's inputs as the call has them, and its outputs; a value that is two of these, or an
    input too, is copied."""
    for value, item in zip(graph.inputs, call.inputs, strict=True):
        value.shape = ir.Shape(call.spread.get(item.name, item.dims))
    taken: set[ir.Value] = set(graph.inputs)
    for index, (value, name) in enumerate(zip(list(graph.outputs), names, strict=True)):
        output = value
        if value in taken or value.is_initializer():
            node = ir.node("Identity", [value])
            graph.append(node)
            output = node.outputs[0]
            output.type, output.shape = value.type, value.shape
            graph.outputs[index] = output
        output.name = name
        taken.add(output)
