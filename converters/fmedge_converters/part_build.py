"""From a part of a pipeline to its written graphs: trace, bind, rewrite, quantize, write."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from fmedge_runtimes.errors import SourceError

from fmedge_converters.build import bind_weights, numpy_dtype
from fmedge_converters.checkpoint import Checkpoint, Files
from fmedge_converters.decoder import quiet_libraries
from fmedge_converters.graph import DecoderGraph
from fmedge_converters.image_adapter import ImageAdapter
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


@dataclass(frozen=True, slots=True)
class PartOptions:
    """What decides the graphs of a part."""

    target: Target
    dtype: torch.dtype
    """Of activations, and of what is not quantized; some parts need another one than the target's."""
    scheme: Scheme
    block_size: int | None
    allow_pickle: bool = False
    adapter: ImageAdapter | None = None
    """A LoRA to merge."""


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
    output: Path,
    options: PartOptions,
    progress: Progress,
) -> list[BuiltGraph]:
    """Write each call of a part as model.onnx and model.onnx.data into a folder of its own below `output`.

    Raises SourceError when the module or its checkpoint cannot be exported, OSError when the disk is full.
    """
    built = []
    with Checkpoint(Files(part.folder, allow_pickle=options.allow_pickle), np.dtype(np.float32)) as checkpoint:
        for name, value in checkpoint.buffers(module).items():
            module.get_buffer(name).copy_(value)
        weights = checkpoint.weights(module)
        if options.adapter is not None:
            weights = options.adapter.applied(part.name, weights)
        for name, call in calls.items():
            progress(f"{name}: tracing", 0, 0)
            traced = trace_module(module, call, options.dtype, str(part.folder), options.target.part_operators)
            typed = {
                parameter: _typed(f"{part.folder}: {parameter}", weights[parameter], traced.dtypes[parameter])
                for parameter in traced.parameters.values()
            }
            graph = bind_weights(traced.model, traced.parameters, typed)
            progress(f"{name}: rewriting", 0, 0)
            with quiet_libraries():
                for rewrite in options.target.part_passes:
                    rewrite(graph, 0)
            quantized = _quantize(graph, options.scheme, options.block_size)
            if options.target.engines:
                require_plain(graph, options.target.name)
            name_values(graph.graph, call, traced.outputs)
            folder = output / name
            folder.mkdir(parents=True)
            written = write_graph(graph, folder, STEM, functools.partial(progress, f"{name}: weights"))
            built.append(BuiltGraph(name, call, graph.model, written, quantized))
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
