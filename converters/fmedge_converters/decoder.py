"""Trace any decoder of transformers into ONNX, without its weights.

transformers lets a model's attention and its mask be replaced by name. Ours records one attention node for each layer
in place of the model's attention, and no mask; everything else is the model's own code, traced on fake tensors by
`torch.onnx.export`. Nothing here knows an architecture.

    traced = trace_decoder(config, ORT, torch.float32)
    traced.model        # the ONNX graph; its weights are named, but have no values
    traced.caches       # what each layer caches
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir
import torch
from accelerate import init_empty_weights
from fmedge_runtimes.errors import SourceError
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput
from transformers.utils import logging as transformers_logging

from fmedge_converters.attention_interface import IMPLEMENTATION, replaced_attention
from fmedge_converters.complex_numbers import ComplexAsPairs
from fmedge_converters.dialects.dialect import Dialect
from fmedge_converters.example_step import SIZES, example_step
from fmedge_converters.experts import IMPLEMENTATION as EXPERTS
from fmedge_converters.exported_program import Names, to_onnx
from fmedge_converters.fakes import fake_parameters, is_fake, name_axes, reason, unchanged_buffers
from fmedge_converters.first_line import first_line
from fmedge_converters.kernels import recurrent_kernels
from fmedge_converters.large_tensors import LargeOnMeta
from fmedge_converters.own_past import OwnPast, Plain, find_own_past, plain_tensors, require_states
from fmedge_converters.position_tables import PositionTables, require_own_positions
from fmedge_converters.recording import LayerCache, LayerState, Recording, recording
from fmedge_converters.rope import freeze_rope
from fmedge_converters.step_layout import Layout
from fmedge_converters.traced_cache import TracedCache

CAPACITY_MULTIPLE = 64
"""Of static caches, so that each row begins at an address that TensorRT can bind."""


@dataclass(frozen=True, slots=True)
class TracedDecoder:
    """A decoder as a graph, before its weights are bound."""

    model: ir.Model
    module: PreTrainedModel
    """The transformers model on fake tensors: parameter names and shapes."""
    caches: tuple[LayerCache, ...]
    states: tuple[LayerState, ...]
    parameters: Mapping[str, str]
    """Name of each initializer that is a parameter, and the parameter's name in the model."""


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the notices of torch and transformers out of our output; errors still rise."""
    bars = transformers_logging.is_progress_bar_enabled()
    disabled = logging.root.manager.disable
    transformers_logging.disable_progress_bar()
    # torch logs the traceback of what it raises, too; the error that rises says it in one line.
    logging.disable(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(disabled)
            if bars:
                transformers_logging.enable_progress_bar()


def empty_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a configuration with parameters on the meta device and buffers in memory.

    Raises SourceError when transformers cannot build it.
    """
    try:
        with quiet_libraries(), init_empty_weights(include_buffers=False), LargeOnMeta():
            # A copy, because transformers notes the attention's name in the configuration it is given.
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=dtype, attn_implementation=IMPLEMENTATION
            )
            if model._can_set_experts_implementation():
                model.set_experts_implementation(EXPERTS)
    except Exception as error:  # each architecture has its own ways to refuse
        raise SourceError(f"transformers cannot build {config.model_type}: {first_line(error)}") from error
    # init_empty_weights makes a new parameter of every assignment, which unties those that were tied.
    model.tie_weights()
    return model.eval()


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The part of a configuration that describes the decoder."""
    return config.get_text_config(decoder=True)


class _Step(torch.nn.Module):
    """One step of decoding: token ids, caches and states in, logits of the asked positions, caches and states out."""

    def __init__(self, model: PreTrainedModel, dialect: Dialect, layout: Layout) -> None:
        super().__init__()
        self.model = model
        self.dialect = dialect
        self.layout = layout

    def forward(
        self,
        input_ids: torch.Tensor,  # [B, S]
        position_ids: torch.Tensor,  # [B, S]
        logits_indices: torch.Tensor,  # [N], into the flattened [B * S]
        step: dict[str, torch.Tensor],
        past: list[tuple[torch.Tensor, torch.Tensor]],
        states: list[torch.Tensor],
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]], list[torch.Tensor]]:
        layout = self.layout
        current = Recording(
            position_ids,
            dialect=self.dialect,
            step=step,
            past={cache.layer: pair for cache, pair in zip(layout.caches, past, strict=True)},
            # Code for one token writes into what it is given.
            past_states={
                state.name: tensor.clone() if layout.one_token else tensor
                for state, tensor in zip(layout.states, states, strict=True)
            },
            attended={cache.layer: cache for cache in layout.caches if cache.layer not in layout.bypassing},
            masked=set(layout.masked),
            bypassing=set(layout.bypassing),
        )
        output = _run(self.model, current, input_ids, logits_indices, layout.own)
        left = {**current.past_states, **current.present_states}
        return (
            output.logits.squeeze(0),
            [current.present[cache.layer] for cache in layout.caches],
            [left[state.name] for state in layout.states],
        )


def _run(
    model: PreTrainedModel,
    current: Recording,
    input_ids: torch.Tensor,
    logits_indices: torch.Tensor,
    own: OwnPast | None = None,
    cached: bool = True,
) -> ModelOutput:
    """One forward pass with our attention, masks and, if `cached`, our cache; logits [1, N, V] where asked for."""

    def keep_asked(_module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden = args[0].reshape(-1, args[0].shape[-1])  # [B * S, E]
        return (hidden.index_select(0, logits_indices).unsqueeze(0),)  # [1, N, E]

    layers = text_config(model.config).num_hidden_layers
    cache = TracedCache(current, layers) if own is None else own.cache(current, layers)
    takes = inspect.signature(model.forward).parameters
    arguments: dict[str, Any] = {"input_ids": input_ids, "use_cache": True}
    # Models name their cache in one of two ways, and some compute positions themselves.
    if cached:
        arguments |= {name: cache for name in ("past_key_values", "cache_params") if name in takes}
    if "position_ids" in takes or any(item.kind is item.VAR_KEYWORD for item in takes.values()):
        arguments["position_ids"] = current.positions
    hook = model.get_output_embeddings().register_forward_pre_hook(keep_asked)
    try:
        with contextlib.ExitStack() as stack:
            if own is not None:
                arguments |= stack.enter_context(own.given(current.past_states, cache))
            for context in (
                unchanged_buffers(model),
                recording(current),
                replaced_attention(),
                recurrent_kernels(model, cache),
                ComplexAsPairs(),
                PositionTables(current),
            ):
                stack.enter_context(context)
            output: ModelOutput = model(**arguments, return_dict=True)
            if own is not None:
                current.present_states.update(own.left(output))
    finally:
        hook.remove()
    return output


def _look(model: PreTrainedModel, dialect: Dialect, context: int, before: Plain | None = None) -> Layout:
    """Run the model on fake tensors to see what its layers keep.

    `before`: what was on its layers before anything ran. With it the model runs on one token, and what it keeps in ways
    of its own is looked for.
    """
    batch, length = SIZES["batch"], SIZES["sequence"] if before is None else 1
    ids = torch.zeros((batch, length), dtype=torch.int64)  # [B, S]
    positions = torch.arange(length).expand(batch, length)  # [B, S]
    asked = torch.zeros(SIZES["logits"], dtype=torch.int64)  # [N]
    seen = Recording(positions)
    with torch.no_grad():
        own = None
        if before is not None:
            own = find_own_past(
                model, before, lambda cached: _run(model, Recording(positions), ids, asked, None, cached)
            )
        _run(model, seen, ids, asked, own)
    require_states(seen.present_states, batch)
    bypassing = seen.bypassing | (seen.appended.keys() - seen.attended.keys())
    caches = []
    for layer in sorted(seen.attended.keys() | seen.appended.keys()):
        cache = seen.appended[layer] if layer in bypassing else seen.attended[layer]
        if layer not in bypassing | seen.masked:
            if (multiple := dialect.head_size_multiple) is not None:
                size = math.ceil(max(cache.key_dim, cache.value_dim) / multiple) * multiple
                cache = replace(cache, key_dim=size, value_dim=size)
            rolls = cache.window is not None and cache.window < context and not dialect.static
            cache = replace(cache, rolling=rolls)
        else:
            cache = replace(cache, window=None)
        capacity = math.ceil(context / CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE if dialect.static else None
        cache = replace(cache, capacity=capacity, in_place=dialect.in_place)
        caches.append(cache)
    states = [
        LayerState(name, tuple(value.shape[1:]), value.dtype, in_place=False)
        for name, value in seen.present_states.items()
    ]
    if not caches and not states:
        raise SourceError(
            f"{model.config.model_type} neither caches keys and values nor keeps a state as transformers' models do, "
            "so fmedge cannot carry its past from step to step."
        )
    return Layout(tuple(caches), tuple(states), frozenset(bypassing), frozenset(seen.masked), before is not None, own)


Buffers = Callable[[PreTrainedModel], Mapping[str, torch.Tensor]]
"""The values that a checkpoint has for the buffers of a model, by name."""


def trace_decoder(
    config: PretrainedConfig,
    dialect: Dialect,
    dtype: torch.dtype,
    context: int,
    stored_buffers: Buffers = lambda _: {},
) -> TracedDecoder:
    """Trace the decoder of a configuration in a dialect.

    Buffers become constants of the graph; those that `stored_buffers` names take its values first.

    Graph inputs: input_ids [B, S], position_ids [B, S], logits_indices [N] (positions, of B * S, whose logits are
    asked), the dialect's own, past_key_values.L.key and .value [B, K, C, D], past_states.NAME [B, ...]. Outputs: logits
    [N, V], present.L.key and .value, present_states.NAME. S is 1 where the model's code allows no more. Takes seconds
    and little memory, whatever the model's size: no weight exists.

    Raises SourceError when the architecture cannot be traced, with the reason.
    """
    with _on_fakes(config, dtype, context, stored_buffers) as model:
        layout, program = _trace(model, dialect, dtype, context)
        require_own_positions(program.model)
    graph = program.model
    parameters = {name: name.removeprefix("model.") for name in graph.graph.initializers if is_fake(graph, name)}
    return TracedDecoder(graph, model, layout.caches, layout.states, parameters)


def find_layout(config: PretrainedConfig, dialect: Dialect, dtype: torch.dtype, context: int) -> Layout:
    """What the layers of a decoder keep, without a trace. Raises SourceError when that cannot be found."""
    with _on_fakes(config, dtype, context, lambda _: {}) as model:
        return _look(model, dialect, context)


@dataclass(frozen=True, slots=True)
class DryRun:
    """One step of a decoder on fake tensors, without a trace."""

    module: PreTrainedModel
    layout: Layout
    inputs: Mapping[str, torch.Tensor]
    outputs: Mapping[str, torch.Tensor]


def dry_run(
    config: PretrainedConfig,
    dialect: Dialect,
    dtype: torch.dtype,
    context: int,
    watch: Callable[[PreTrainedModel], contextlib.AbstractContextManager[object]],
    stored_buffers: Buffers = lambda _: {},
) -> DryRun:
    """Run the step of any number of tokens that `trace_decoder` traces while `watch(model)` looks on; a small part of
    the time.

    Raises SourceError when there is no such step.
    """
    with _on_fakes(config, dtype, context, stored_buffers) as model:
        layout = _look(model, dialect, context)
        example = example_step(dialect, layout, dtype)
        with watch(model), torch.no_grad():
            outputs = _Step(model, dialect, layout)(*example.arguments)
    return DryRun(
        model,
        layout,
        dict(zip(example.input_names, tree_leaves(example.arguments), strict=True)),
        dict(zip(example.output_names, tree_leaves(outputs), strict=True)),
    )


@contextlib.contextmanager
def _on_fakes(
    config: PretrainedConfig, dtype: torch.dtype, context: int, stored_buffers: Buffers
) -> Iterator[PreTrainedModel]:
    """The model with fake parameters; whatever fails inside becomes a SourceError."""
    model = empty_model(config, dtype)
    if model.get_output_embeddings() is None:
        raise SourceError(f"{config.model_type} has no language-model head.")
    freeze_rope(model, context)
    for name, value in stored_buffers(model).items():
        model.get_buffer(name).copy_(value)
    try:
        with quiet_libraries(), FakeTensorMode(allow_non_fake_inputs=True):
            fake_parameters(model, lambda _, parameter: dtype if parameter.dtype.is_floating_point else parameter.dtype)
            yield model
    except SourceError as error:
        raise SourceError(f"{config.model_type} cannot be exported: {error}") from error
    except Exception as error:
        raise SourceError(f"{config.model_type} cannot be traced: {reason(error)}") from error


def _trace(
    model: PreTrainedModel, dialect: Dialect, dtype: torch.dtype, context: int
) -> tuple[Layout, torch.onnx.ONNXProgram]:
    """Trace a step of any number of tokens; where the model's code does not allow that, of one."""
    before = plain_tensors(model)
    try:
        layout = _look(model, dialect, context)
        program = _export(model, dialect, layout, dtype)
        _require_dynamic(program.model, ("rows", "tokens"))
    except Exception as error:
        try:
            layout = _look(model, dialect, context, before)
        except Exception:
            raise error from error.__cause__
        program = _export(model, dialect, layout, dtype)
        _require_dynamic(program.model, ("rows",))
    return layout, program


def _require_dynamic(model: ir.Model, axes: Sequence[str]) -> None:
    """A model whose code counts its tokens in Python has been traced for the example's numbers only."""
    ids = next(value for value in model.graph.inputs if value.name == "input_ids")
    fixed = [name for name, dim in zip(axes, ids.shape or (), strict=False) if isinstance(dim, int)]
    if fixed:
        raise SourceError(
            f"its code fixes the number of {' and '.join(fixed)} in a step, so the graph would serve one."
        )


def _export(model: PreTrainedModel, dialect: Dialect, layout: Layout, dtype: torch.dtype) -> torch.onnx.ONNXProgram:
    example = example_step(dialect, layout, dtype)
    names = Names(example.input_names, example.output_names)
    with torch.no_grad():
        program = to_onnx(
            _Step(model, dialect, layout), example.arguments, example.dynamic_shapes, dialect.opset, names
        )
    # torch names no axis at all once a list of inputs is empty.
    name_axes(program, example.axes)
    return program
