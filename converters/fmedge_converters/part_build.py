"""From a part of a pipeline to its written graphs: trace, bind, rewrite, quantize, write."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
import torch
from fmedge_runtimes.errors import SourceError

from fmedge_converters.build import bind_weights, numpy_dtype
from fmedge_converters.checkpoint import Checkpoint, Files
from fmedge_converters.decoder import quiet_libraries
from fmedge_converters.graph import DecoderGraph
from fmedge_converters.kept_precise import is_kept
from fmedge_converters.module_trace import name_values, trace_module
from fmedge_converters.parts.part import Call
from fmedge_converters.passes.convolution import convolutions
from fmedge_converters.passes.linear import linears
from fmedge_converters.pipeline_source import PartSource
from fmedge_converters.plain_graph import require_plain
from fmedge_converters.schemes.floating import FLOATING
from fmedge_converters.schemes.scheme import Scheme
from fmedge_converters.schemes.stored_floats import store_weights
from fmedge_converters.targets import Target
from fmedge_converters.weight import Array, Weight, mapped
from fmedge_converters.writer import WrittenGraph, write_graph

STEM = "model"

Progress = Callable[[str, int, int], None]


class Adapter(Protocol):
    """What changes the parts of a pipeline on their way: a LoRA, an IP-Adapter."""

    def applied(self, part: str, weights: Mapping[str, Weight]) -> dict[str, Weight]:
        """The weights of a part with it. Raises SourceError."""
        ...

    def attach(self, part: str, module: torch.nn.Module) -> None:
        """Add the layers that it needs to a module that is about to be traced. Raises SourceError."""
        ...

    def call(self, part: str, call: Call) -> Call:
        """How the part is called with it."""
        ...

    def check_used(self, part: str, parameters: Iterable[str]) -> None:
        """Raise SourceError if a graph with these parameters does not have it."""
        ...

    def merge(self, part: str, module: torch.nn.Module) -> None:
        """Bring it into a module with weights, by PyTorch."""
        ...


@dataclass(frozen=True, slots=True)
class PartOptions:
    """What decides the graphs of a part."""

    target: Target
    dtype: torch.dtype
    """Of activations, and of what is not quantized; some parts need another one than the target's."""
    schemes: tuple[Scheme, ...]
    """Each gives a form of the part."""
    block_size: int | None
    allow_pickle: bool = False
    adapters: tuple[Adapter, ...] = ()
    """A LoRA to merge, or to keep beside the weights; an IP-Adapter."""
    ranges: Mapping[str, float] = field(default_factory=dict)
    """The largest magnitude of a product's input, by the parameter that is its weight, where it was measured."""


@dataclass(frozen=True, slots=True)
class BuiltGraph:
    """A graph of a part, written."""

    name: str
    """Its folder in the bundle."""
    call: Call
    model: ir.Model
    written: WrittenGraph
    quantized: int
    """Weights that are not what the target computes with."""


def build_part(
    part: PartSource,
    module: Any,  # noqa: ANN401 - any module
    calls: Mapping[str, Call],
    outputs: Sequence[Path],
    options: PartOptions,
    progress: Progress,
) -> list[list[BuiltGraph]]:
    """Write each call of a part as model.onnx and model.onnx.data into a folder of its own: one list for each scheme,
    each below its own one of `outputs`. The module is traced once.

    Raises SourceError when the module or its checkpoint cannot be exported, OSError when the disk is full.
    """
    built: list[list[BuiltGraph]] = [[] for _ in outputs]
    with Checkpoint(Files(part.folder, allow_pickle=options.allow_pickle), np.dtype(np.float32)) as checkpoint:
        for name, value in checkpoint.buffers(module).items():
            module.get_buffer(name).copy_(value)
        weights = checkpoint.weights(module)
        for adapter in options.adapters:
            weights = adapter.applied(part.name, weights)
            adapter.attach(part.name, module)
            calls = {name: adapter.call(part.name, call) for name, call in calls.items()}
        for name, call in calls.items():
            progress(f"{name}: tracing", 0, 0)
            traced = trace_module(module, call, options.dtype, str(part.folder), options.target.part_operators)
            for adapter in options.adapters:
                adapter.check_used(part.name, traced.parameters.values())
            typed = {
                parameter: _typed(f"{part.folder}: {parameter}", weights[parameter], traced.dtypes[parameter])
                for parameter in traced.parameters.values()
            }
            graph = bind_weights(traced.model, traced.parameters, typed)
            progress(f"{name}: rewriting", 0, 0)
            with quiet_libraries():
                for rewrite in options.target.part_passes:
                    rewrite(graph, 0)
            for linear in linears(graph):
                parameter = traced.parameters.get(linear.name.removesuffix(".T"), "")
                if parameter in options.ranges:
                    graph.input_ranges[linear.name] = options.ranges[parameter]
            for number, (output, scheme) in enumerate(zip(outputs, options.schemes, strict=True)):
                last = number + 1 == len(outputs)
                form = graph if last else DecoderGraph(graph.model.clone(), dict(graph.weights), graph.input_ranges)
                quantized = _quantize(form, scheme, options.block_size)
                if options.target.engines:
                    require_plain(form, options.target.name)
                name_values(form.graph, call, traced.outputs)
                folder = output / name
                folder.mkdir(parents=True)
                written = write_graph(form, folder, STEM, functools.partial(progress, f"{name}: weights"))
                built[number].append(BuiltGraph(name, call, form.model, written, quantized))
    return built


def _quantize(graph: DecoderGraph, scheme: Scheme, block_size: int | None) -> int:
    count = 0
    # Last first: what a Linear reads may be the output of another, which is replaced in its turn.
    for linear in reversed(linears(graph)):
        floating = scheme.name == FLOATING.name or is_kept(linear.name.removeprefix("module."))
        spell = FLOATING.linear if floating else scheme.linear
        spell(graph, linear, is_head=False, block_size=block_size or scheme.block_size)
        count += not floating and scheme.storage is None
    if scheme.convolution is not None:
        for convolution in convolutions(graph):
            if not is_kept(convolution.name.removeprefix("module.")):
                scheme.convolution(graph, convolution)
                count += 1
    graph.remove_unused()
    if scheme.storage is not None:
        count += store_weights(graph, scheme.storage)
    return count


def _typed(where: str, weight: Weight, dtype: torch.dtype) -> Weight:
    """A weight in another floating type, which refuses to be read if fp16 does not hold it."""
    kind = numpy_dtype(dtype)
    if weight.dtype == kind:
        return weight

    def convert(array: Array) -> Array:
        with np.errstate(over="ignore"):
            converted: Array = array.astype(kind)
        if not np.isfinite(converted).all():
            raise SourceError(
                f"{where} has values that are not finite, or beyond fp16's range (65504); export for a target that "
                "computes in fp32 (cpu)."
            )
        return converted

    return mapped(convert, [weight], kind)
