"""Rounding that knows which input features matter: errors count as much as the features' mean squares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from fmedge_runtimes.manifest import Evidence

from fmedge_converters.calibration.calibration import Calibration, Report
from fmedge_converters.calibration.places import placed_linears, placed_stacks
from fmedge_converters.graph import DecoderGraph
from fmedge_converters.rounding import Rounding
from fmedge_converters.weight import Weight


def weigh_errors(
    graph: DecoderGraph, calibration: Calibration, rounding: Callable[[Weight], Rounding] | None, report: Report
) -> Evidence:
    """Give weights the importance of their input features, which whatever rounds them looks at."""
    del rounding
    statistics = calibration.statistics(report)
    count = 0
    for placed in placed_linears(graph, calibration.parameters):
        found = [statistics[place] for place in placed.places if place in statistics]
        if len(found) == len(placed.places):
            name = placed.linear.name
            graph.weights[name] = replace(graph.weights[name], importance=found[0].mean_square.numpy())
            count += len(found)
    for stack in placed_stacks(graph, calibration.parameters):
        known = [statistics[place].mean_square.numpy() for place in stack.places if place in statistics]
        if known:
            # Features of experts that saw no token matter as they do for the others.
            mean = np.mean(known, axis=0)
            each = [statistics[place].mean_square.numpy() if place in statistics else mean for place in stack.places]
            graph.weights[stack.name] = replace(graph.weights[stack.name], importance=np.stack(each))
            count += len(known)
    return calibration.evidence("weights rounded by what their input features matter", {"matrices": count})
