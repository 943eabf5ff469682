"""From a configuration and a checkpoint to a written graph: trace, bind, rewrite, quantize, write."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from fmedge_runtimes.manifest import Evidence
from transformers import PretrainedConfig

from fmedge_converters.budget import spend_bits
from fmedge_converters.calibration.calibration import Calibration
from fmedge_converters.calibration.places import placed_heads
from fmedge_converters.checkpoint import Checkpoint, Files
from fmedge_converters.decoder import TracedDecoder
from fmedge_converters.graph import DecoderGraph
from fmedge_converters.in_place import updates_in_place
from fmedge_converters.layouts.layout import Layout
from fmedge_converters.mixed_precision import Allocation
from fmedge_converters.plain_graph import require_plain
from fmedge_converters.quantize import Quantization, quantize
from fmedge_converters.recording import LayerCache, LayerState
from fmedge_converters.repeated_layers import trace_by_layers
from fmedge_converters.schemes.scheme import Scheme
from fmedge_converters.schemes.stored_floats import store_weights
from fmedge_converters.targets import Target
from fmedge_converters.weight import Weight
from fmedge_converters.writer import WrittenGraph, write_graph

Progress = Callable[[str, int, int], None]
"""Called with a stage, what of it is done, and its whole; (stage, 0, 0) when a stage without measure begins."""

STEM = "decoder"
PREFILL_STEM = "prefill"

Prepare = Callable[[dict[str, Weight]], dict[str, Weight]]
"""Changes what is known of weights, by the names of PyTorch's parameters, before they are bound to the graph: what
matters in them (`importance`), how they are rounded (`rounding`), codes from elsewhere (`packed`), other numbers."""


def as_they_are(weights: dict[str, Weight]) -> dict[str, Weight]:
    """Change nothing."""
    return weights


@dataclass(frozen=True, slots=True)
class Second:
    """What decides a second graph with the same inputs and outputs."""

    scheme: Scheme
    calibration: Calibration | None


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """What decides the graph of a given model."""

    target: Target
    scheme: Scheme
    block_size: int | None
    """None: as the scheme has it."""
    context: int
    layout: Layout | None = None
    """Another runtime that must be able to run the graph, too."""
    prepare: Prepare = as_they_are
    bits: float | None = None
    """A budget of bits per weight, for roundings whose costs `prepare` gives; None: as the scheme has it."""
    calibration: Calibration | None = None
    """What the scheme fits its weights to, if it does."""
    prefill: Second | None = None
    """The graph for prompts; None: there is none."""


@dataclass(frozen=True, slots=True)
class BuiltGraph:
    """A written graph."""

    written: WrittenGraph
    model: ir.Model


@dataclass(frozen=True, slots=True)
class BuiltDecoder:
    """A written decoder and what its runtime must know."""

    written: WrittenGraph
    model: ir.Model
    caches: tuple[LayerCache, ...]
    states: tuple[LayerState, ...]
    vocabulary: int
    quantization: Quantization
    allocation: Allocation | None
    """What was chosen for each matrix, if there was a budget."""
    source_format: str | None
    """The quantization of the source, None if it has none."""
    calibration: Evidence | None
    """What was fitted to calibration text."""
    prefill: BuiltGraph | None = None
    """The second graph, for prompts."""

    @property
    def graphs(self) -> tuple[BuiltGraph, ...]:
        """The decoder's graph, and the one for prompts if there is one."""
        decoder = BuiltGraph(self.written, self.model)
        return (decoder,) if self.prefill is None else (decoder, self.prefill)


def numpy_dtype(dtype: torch.dtype) -> np.dtype[np.generic]:
    """The numpy spelling of a torch dtype."""
    return torch.empty(0, dtype=dtype).numpy().dtype


def build_decoder(
    config: PretrainedConfig, files: Files, output: Path, options: BuildOptions, progress: Progress
) -> BuiltDecoder:
    """Write decoder.onnx and decoder.onnx.data into `output`, and a second graph beside them if one is asked for.

    Raises SourceError when the model or its checkpoint cannot be exported, ExportError when the layout cannot express
    it, OSError when the disk is full.
    """
    target = options.target
    with Checkpoint(files, numpy_dtype(target.dtype)) as checkpoint:
        progress("tracing", 0, 0)
        traced = trace_by_layers(config, target.dialect, target.dtype, options.context, checkpoint.buffers)
        if options.layout is not None:
            options.layout.check_decoder(traced)
        weights = _keeping(checkpoint.weights(traced.module), options.scheme)
        prepared = options.prepare(weights)
        second = None if options.prefill is None else replace(traced, model=traced.model.clone())
        graph = _rewritten(traced, prepared, options, progress)
        allocation = None if options.bits is None else spend_bits(graph, options.scheme, options.bits)
        calibration = _calibrate(graph, traced, options.scheme, options.calibration, options.block_size, progress)
        quantization = quantize(graph, options.scheme, options.block_size)
        if options.scheme.storage is not None:
            store_weights(graph, options.scheme.storage)
        if target.engines:
            require_plain(graph, target.name)
        stage = "weights"
        if checkpoint.source_format is not None:
            stage = f"weights ({quantization.kept} of {quantization.matrices} matrices keep their codes)"
        written = write_graph(graph, output, STEM, functools.partial(progress, stage))
        prefill = None
        if second is not None and options.prefill is not None:
            other = _rewritten(second, prepared, options, progress)
            scheme = options.prefill.scheme
            _calibrate(other, traced, scheme, options.prefill.calibration, options.block_size, progress)
            quantize(other, scheme, options.block_size)
            stage = "weights of the graph for prompts"
            prefill = BuiltGraph(
                write_graph(other, output, PREFILL_STEM, functools.partial(progress, stage), written), other.model
            )
    vocabulary = graph.graph.outputs[0].shape
    size = vocabulary[-1] if vocabulary is not None else None
    if not isinstance(size, int):
        size = traced.module.get_output_embeddings().weight.shape[0]
    graphs = [graph.model.graph, *([] if prefill is None else [prefill.model.graph])]
    states = tuple(
        replace(state, in_place=all(_updates_in_place(each, state, target) for each in graphs))
        for state in traced.states
    )
    return BuiltDecoder(
        written,
        graph.model,
        traced.caches,
        states,
        int(size),
        quantization,
        allocation,
        checkpoint.source_format,
        calibration,
        prefill,
    )


def _rewritten(
    traced: TracedDecoder, weights: dict[str, Weight], options: BuildOptions, progress: Progress
) -> DecoderGraph:
    """A traced graph with its weights, behind the target's passes."""
    graph = bind(traced, weights)
    progress("rewriting", 0, 0)
    for rewrite in options.target.passes:
        rewrite(graph, options.context)
    return graph


def _updates_in_place(graph: ir.Graph, state: LayerState, target: Target) -> bool:
    if target.engines:
        return False  # TensorRT promises nothing of an output that shares the memory of an input, but for TensorScatter
    values = {str(value.name): value for value in (*graph.inputs, *graph.outputs)}
    past, present = values[f"past_states.{state.name}"], values[f"present_states.{state.name}"]
    return updates_in_place(graph, past, present, target.read_first)


def _calibrate(
    graph: DecoderGraph,
    traced: TracedDecoder,
    scheme: Scheme,
    calibration: Calibration | None,
    block_size: int | None,
    progress: Progress,
) -> Evidence | None:
    """Let the scheme fit its weights."""
    if calibration is None or scheme.calibrate is None:
        return None
    rounding = None
    if scheme.rounding is not None:
        rounding = functools.partial(scheme.rounding, is_head=False, block_size=block_size or scheme.block_size)
    if scheme.rounding is not None and calibration.lookups is not None:
        for head in placed_heads(graph):
            weight = graph.weights[head.name]
            usual = scheme.rounding(weight, is_head=True, block_size=block_size or scheme.block_size)
            graph.weights[head.name] = replace(weight, rounding=usual)
    calibration.parameters = traced.parameters
    return scheme.calibrate(graph, calibration, rounding, progress)


def _keeping(weights: dict[str, Weight], scheme: Scheme) -> dict[str, Weight]:
    """The weights, without the codes of their source where the scheme makes its own."""
    return {
        name: weight
        if weight.packed is None
        else replace(weight, packed=None if scheme.keeps is None else scheme.keeps(weight))
        for name, weight in weights.items()
    }


def bind(traced: TracedDecoder, weights: dict[str, Weight]) -> DecoderGraph:
    """Give every parameter of a decoder's graph its weight, unread."""
    return bind_weights(traced.model, traced.parameters, weights)


def bind_weights(model: ir.Model, parameters: Mapping[str, str], weights: Mapping[str, Weight]) -> DecoderGraph:
    """Give every initializer that `parameters` names its weight, unread."""
    graph = DecoderGraph(model, {})
    for name, parameter in parameters.items():
        weight = weights[parameter]
        value = graph.graph.initializers[name]
        value.const_value = ir.LazyTensor(
            functools.partial(_read, weight),
            dtype=ir.DataType.from_numpy(weight.dtype),
            shape=ir.Shape(weight.shape),
            name=name,
        )
        graph.weights[name] = weight
    return graph


def _read(weight: Weight) -> ir.TensorProtocol:
    return ir.tensor(weight.array())
