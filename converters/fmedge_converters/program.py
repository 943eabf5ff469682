"""A decoder's step as a straight line of operations over values, cut into its layers, and what makes two layers alike.

Both the operations that PyTorch runs in a step and the nodes of its ONNX graph are such programs. Two layers are alike
when one is the other with its parameters, caches and states exchanged: the same operators with the same attributes in
the same order, and every operand the same constant, the same tensor of its own layer, or what came out of the same
place of the same layer before it.

What a layer computes from nothing of a layer (the number of tokens, a cosine with one more axis) counts as a constant
that is named by how it is computed: tracers let one layer use what another one has computed of these.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

BEFORE = -1
"""The layer of operations in front of the first; those behind the last have the number of layers."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation: what it does, including all of its constants, and the values that it reads and makes."""

    what: Hashable
    inputs: tuple[Hashable | None, ...]
    outputs: tuple[Hashable, ...]
    layer: int


@dataclass(frozen=True, slots=True)
class Source:
    """A value that no operation makes: a parameter, an input or a constant."""

    name: str
    """For what belongs to a layer, with {} for the number of the layer; constants are named by their content."""
    layer: int | None


@dataclass(frozen=True, slots=True)
class Program:
    """Operations in their order; every value that none of them makes is a source."""

    operations: Sequence[Operation]
    sources: Mapping[Hashable, Source]
    layers: int


@dataclass(frozen=True, slots=True)
class Likeness:
    """What a program does before, in and after its layers; equal parts do the same."""

    before: Hashable
    layers: tuple[Hashable, ...]
    after: Hashable


class UnknownValue(LookupError):
    """An operation reads what is neither a source nor made by an operation before it."""


def likeness(program: Program) -> Likeness:
    """The canonical form of each part of a program. Raises UnknownValue."""
    common = invariants(program)
    places = _places(program, common)
    handed_on = exports(program, common)
    ranks = {value: rank for values in handed_on for rank, value in enumerate(values)}

    def operand(value: Hashable | None, layer: int) -> Hashable:
        if value is None:
            return None
        if value in common:
            return common[value]
        source = program.sources.get(value)
        if source is not None:
            return (source.name, "own" if source.layer == layer else source.layer)
        made_in, position, output = places[value]
        return (position, output) if made_in == layer else ("layers ago", layer - made_in, ranks[value])

    parts: list[list[Hashable]] = [[] for _ in range(program.layers + 2)]
    for operation in program.operations:
        if operation.layer == BEFORE or not _is_invariant(operation, common):
            operands = tuple(operand(value, operation.layer) for value in operation.inputs)
            parts[operation.layer + 1].append((operation.what, operands, len(operation.outputs)))
    # Which of its values a layer hands on is part of what it does: the layers behind it count them.
    for layer, values in enumerate(handed_on):
        parts[layer + 1].append(tuple(places[value][1:] for value in values))
    before, *layers, after = (tuple(part) for part in parts)
    return Likeness(before, tuple(layers), after)


def invariants(program: Program) -> dict[Hashable, str]:
    """All values that depend on nothing of a layer, named by how they are computed. Raises UnknownValue."""
    names: dict[Hashable, str] = {}
    made: set[Hashable] = set()
    for operation in program.operations:
        operands = []
        for value in operation.inputs:
            source = program.sources.get(value)
            if value is not None and source is None and value not in made:
                raise UnknownValue
            if value is None or value in names:
                operands.append(names.get(value, "nothing"))
            elif source is not None and (source.layer is None or operation.layer == BEFORE):
                operands.append(f"{source.name} {source.layer}")
        made.update(operation.outputs)
        if operation.layer == BEFORE or len(operands) == len(operation.inputs):
            text = hashlib.sha256(repr((operation.what, operands)).encode()).hexdigest()
            names |= {value: f"{text} {output}" for output, value in enumerate(operation.outputs)}
    return names


def exports(program: Program, common: Mapping[Hashable, str]) -> list[list[Hashable]]:
    """For each layer the values that operations behind it read, but invariants, in the order in which they are made."""
    places = _places(program, common)
    found: list[set[Hashable]] = [set() for _ in range(program.layers)]
    for operation in program.operations:
        for value in operation.inputs:
            if value in places and places[value][0] != operation.layer:
                found[places[value][0]].add(value)
    return [sorted(values, key=lambda value: places[value]) for values in found]


def _places(program: Program, common: Mapping[Hashable, str]) -> dict[Hashable, tuple[int, int, int]]:
    """Where each value that depends on a layer is made: layer, number of the operation in it, number of the output."""
    counts: dict[int, int] = {}
    places: dict[Hashable, tuple[int, int, int]] = {}
    for operation in program.operations:
        if _is_invariant(operation, common):
            continue
        position = counts.get(operation.layer, 0)
        counts[operation.layer] = position + 1
        for output, value in enumerate(operation.outputs):
            places[value] = (operation.layer, position, output)
    return places


def _is_invariant(operation: Operation, common: Mapping[Hashable, str]) -> bool:
    return bool(operation.outputs) and all(value in common for value in operation.outputs)
