"""Which matrices of the PyTorch model the products of a graph have as weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fmedge_converters.calibration.linear_inputs import Place
from fmedge_converters.graph import DecoderGraph
from fmedge_converters.passes.linear import Linear, heads, linears
from fmedge_converters.passes.mixture import expert_linears


@dataclass(frozen=True, slots=True)
class PlacedLinear:
    """A Linear node that is rounded, and the matrices that its weight [N, K] consists of, one below the other."""

    linear: Linear
    places: tuple[Place, ...]


@dataclass(frozen=True, slots=True)
class PlacedStack:
    """The weight [E, N, K] of a mixture's product, and its matrices."""

    name: str
    places: tuple[Place, ...]


def placed_linears(graph: DecoderGraph, parameters: Mapping[str, str]) -> list[PlacedLinear]:
    """The Linear nodes of layers whose weights are parameters, not those that are exact or have codes of a source.

    `parameters`: the parameter of each initializer that is one. The head is in no layer.
    """
    found = []
    of_head = {head.node for head in heads(graph)}
    for linear in linears(graph):
        if linear.node in of_head:
            continue
        names = [parameters.get(name.removesuffix(".T")) for name in linear.name.split("+")]
        known = [name for name in names if name is not None]
        if not linear.exact and graph.weights[linear.name].packed is None and len(known) == len(names):
            found.append(PlacedLinear(linear, tuple(map(Place, known))))
    return found


def placed_heads(graph: DecoderGraph) -> list[Linear]:
    """The head, or the parts of one that is divided, where they are rounded and have no codes of a source."""
    return [one for one in heads(graph) if not one.exact and graph.weights[one.name].packed is None]


def placed_stacks(graph: DecoderGraph, parameters: Mapping[str, str]) -> list[PlacedStack]:
    """The experts' weights that are parameters as they are, without codes of a source."""
    found = []
    for item in expert_linears(graph):
        parameter = parameters.get(item.name)
        # One that is stored [E, K, N] is another weight, made of that.
        as_stored = graph.weights[item.name] is item.weight
        if parameter is not None and item.weight.packed is None and as_stored:
            experts = range(item.weight.shape[0])
            found.append(PlacedStack(item.name, tuple(Place(parameter, expert) for expert in experts)))
    return found
