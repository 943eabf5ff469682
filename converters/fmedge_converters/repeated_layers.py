"""Trace a deep decoder from a few of its layers.

Tracing takes most of a second for every layer, and most layers of a decoder do the same with other weights. One step of
the whole model runs on fake tensors, which is fast, and every operation is noted: layers with the same operations are
of one kind. A shorter model with at most the first layer, the last, and two of each kind is traced, and the graph of
each remaining layer is a copy of one of its kind with its parameters, caches and states renamed.

It is the same graph as that of the whole model, because it is only done when
- a step of the short model does the same as one of the whole model before the layers, behind them, and in each layer:
  the same operators with the same constants and shapes over the same operands (`program.likeness`);
- layers of one kind are the same in the graph that was traced, node by node.
Otherwise the whole model is traced.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Hashable, Mapping, Sequence

import torch
from fmedge_runtimes.errors import SourceError
from transformers import PretrainedConfig, PreTrainedModel

from fmedge_converters.decoder import Buffers, TracedDecoder, text_config, trace_decoder
from fmedge_converters.dialects.dialect import Dialect
from fmedge_converters.layer_copies import copy_layers
from fmedge_converters.program import Likeness, UnknownValue, likeness
from fmedge_converters.program_of_graph import graph_program
from fmedge_converters.program_of_step import StepProgram, named_source, step_program

FEWEST = 6
"""Layers of a model below which tracing them all takes no longer."""


def trace_by_layers(
    config: PretrainedConfig,
    dialect: Dialect,
    dtype: torch.dtype,
    context: int,
    stored_buffers: Buffers = lambda _: {},
) -> TracedDecoder:
    """What `trace_decoder` returns, sooner. Raises SourceError as it does."""
    try:
        traced = _from_a_few_layers(config, dialect, dtype, context, stored_buffers)
    except SourceError:  # the whole trace says why, or finds a way
        traced = None
    return trace_decoder(config, dialect, dtype, context, stored_buffers) if traced is None else traced


def _from_a_few_layers(
    config: PretrainedConfig, dialect: Dialect, dtype: torch.dtype, context: int, stored_buffers: Buffers
) -> TracedDecoder | None:
    if getattr(text_config(config), "num_hidden_layers", 0) < FEWEST:
        return None
    whole = step_program(config, dialect, dtype, context, stored_buffers)
    wanted = _likeness(whole)
    if wanted is None:
        return None
    common = functools.partial(_common_buffers, whole)
    for kept in _choices(wanted):
        short = _shortened(config, kept)
        kinds = _kinds(wanted, short, dialect, dtype, context, common)
        if kinds is None:
            continue
        traced = trace_decoder(short, dialect, dtype, context, common)
        program = graph_program(traced, str(whole.layer_list), len(kept))
        if program is None:
            return None
        nodes = likeness(program.program).layers
        if any(len({nodes[layer] for layer in twins}) > 1 for twins in kinds.values()):
            return None
        return copy_layers(traced, program, _order(wanted, kinds), whole)
    return None


def _common_buffers(whole: StepProgram, short: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The values of the short model's buffers that belong to no layer."""
    values = dict(whole.module.named_buffers())
    names = {name for name in short.state_dict() if named_source(name, whole.layer_list).layer is None}
    return {name: values[name] for name, _ in short.named_buffers() if name in names and name in values}


def _likeness(step: StepProgram) -> Likeness | None:
    try:
        return None if step.program is None else likeness(step.program)
    except UnknownValue:
        return None


def _choices(wanted: Likeness) -> list[list[int]]:
    """Layers that a short model may consist of: some of each kind, or, for architectures that tell kinds apart by the
    number of the layer, all up to one."""
    count = len(wanted.layers)
    kinds = [
        [*layers[:1], *layers[1:][-1:]] if layers[-1] == count - 1 else layers[:2]
        for layers in _by_kind(wanted).values()
    ]
    some = sorted({layer for layers in kinds for layer in layers})
    last = max(layers[:2][-1] for layers in _by_kind(wanted).values())
    choices = [some, list(range(last + 1))]
    return [kept for kept in choices if len(kept) + 2 <= count]


def _shortened(config: PretrainedConfig, kept: Sequence[int]) -> PretrainedConfig:
    """The configuration with these layers only."""
    short = copy.deepcopy(config)
    text = text_config(short)
    count = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list | tuple) and len(value) == count and not name.startswith("_"):
            setattr(text, name, type(value)(value[layer] for layer in kept))
    text.num_hidden_layers = len(kept)
    return short


def _order(wanted: Likeness, kinds: Mapping[Hashable, Sequence[int]]) -> list[int]:
    """For each layer of the whole model the one to copy: the first of its kind at first, which may compute what the
    others of its kind share, then the second."""
    seen: set[Hashable] = set()
    order = []
    for kind in wanted.layers:
        order.append(kinds[kind][1 if kind in seen else 0])
        seen.add(kind)
    return order


def _kinds(
    wanted: Likeness,
    short: PretrainedConfig,
    dialect: Dialect,
    dtype: torch.dtype,
    context: int,
    stored_buffers: Buffers,
) -> dict[Hashable, list[int]] | None:
    """The layers of the short model of each kind; None if it does not have the kinds of the whole one, those that
    repeat at least twice."""
    try:
        found = _likeness(step_program(short, dialect, dtype, context, stored_buffers))
    except SourceError:  # not every configuration can be shortened
        return None
    if found is None or (found.before, found.after) != (wanted.before, wanted.after):
        return None
    kinds, needed = _by_kind(found), _by_kind(wanted)
    if kinds.keys() != needed.keys():
        return None
    return kinds if all(len(kinds[kind]) >= min(len(layers), 2) for kind, layers in needed.items()) else None


def _by_kind(found: Likeness) -> dict[Hashable, list[int]]:
    kinds: dict[Hashable, list[int]] = {}
    for layer, kind in enumerate(found.layers):
        kinds.setdefault(kind, []).append(layer)
    return kinds
