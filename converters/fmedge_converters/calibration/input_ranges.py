"""The largest magnitude that each product's input has on calibration text, for codes with fixed scales."""

from __future__ import annotations

from collections.abc import Callable

import torch
from fmedge_runtimes.manifest import Evidence

from fmedge_converters.calibration.calibration import Calibration, Report
from fmedge_converters.calibration.linear_inputs import Place
from fmedge_converters.calibration.places import placed_linears, placed_stacks
from fmedge_converters.calibration.statistics import Statistics
from fmedge_converters.graph import DecoderGraph
from fmedge_converters.rounding import Rounding
from fmedge_converters.weight import Array, Weight


def note_input_ranges(
    graph: DecoderGraph, calibration: Calibration, rounding: Callable[[Weight], Rounding] | None, report: Report
) -> Evidence:
    """Note the range of the inputs of all products."""
    del rounding
    statistics = calibration.statistics(report)
    found = largest_inputs(graph, calibration, statistics)
    for name, values in found.items():
        graph.input_ranges[name] = float(values.max())
    note_experts(graph, calibration, statistics)
    return calibration.evidence("ranges of activations measured", {"products": len(found)})


def largest_inputs(
    graph: DecoderGraph, calibration: Calibration, statistics: dict[Place, Statistics]
) -> dict[str, Array]:
    """By the name of a product's weight, the largest magnitude of each feature of its input [K]."""
    return {
        one.linear.name: _largest(one.places, statistics)
        for one in placed_linears(graph, calibration.parameters)
        if one.places[0] in statistics
    }


def note_experts(graph: DecoderGraph, calibration: Calibration, statistics: dict[Place, Statistics]) -> None:
    """Ranges of the inputs of each expert; of all experts for one that no token reached."""
    for stack in placed_stacks(graph, calibration.parameters):
        known = {place.expert: float(statistics[place].largest.max()) for place in stack.places if place in statistics}
        for place in stack.places:
            if known:
                graph.input_ranges[f"{stack.name}.{place.expert}"] = known.get(place.expert, max(known.values()))


def _largest(places: tuple[Place, ...], statistics: dict[Place, Statistics]) -> Array:
    found = [statistics[place].largest for place in places if place in statistics]
    result: Array = torch.stack(found).amax(0).numpy()
    return result
