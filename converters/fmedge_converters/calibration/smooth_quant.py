"""Smoothing: what is large in activations becomes large in weights, in front of a rounding that has one scale for all
features of the activations.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", 2022
(https://arxiv.org/abs/2211.10438): features are divided by max|x| ** a / max|w| ** (1 - a), and their weights are
multiplied by it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from fmedge_runtimes.manifest import Evidence

from fmedge_converters.calibration.calibration import Calibration, Report
from fmedge_converters.calibration.input_ranges import largest_inputs, note_experts
from fmedge_converters.calibration.places import placed_linears
from fmedge_converters.calibration.scale_sites import scale_sites, scaled_columns
from fmedge_converters.graph import DecoderGraph
from fmedge_converters.rounding import Rounding
from fmedge_converters.weight import Array, Weight

EXPONENT = 0.5
"""The paper's a: how much of the difficulty goes to the weights."""
LEAST = 1e-5
"""The smallest magnitude that counts, as a part of the largest: dead features ask for no factor of their own."""
MOST_NOISE = 0.003
"""Of a product whose input is rounded with one scale, as a part of its output (docs/quantization.md)."""


def smooth(
    graph: DecoderGraph,
    calibration: Calibration,
    rounding: Callable[[Weight], Rounding] | None,
    report: Report,
    *,
    cached: bool = True,
) -> Evidence:
    """Smooth every input that the graph can divide, and note the range of those that one scale can carry then.

    Some inputs are beyond it: a feature of a few tokens, thousands of times as large as the others (Sun et al.,
    "Massive Activations in Large Language Models", 2024, https://arxiv.org/abs/2402.17762), leaves them a step or two.
    `cached` False leaves what goes into the cache as it is.
    """
    del rounding
    statistics = calibration.statistics(report)
    placed = {one.linear.node: one for one in placed_linears(graph, calibration.parameters)}
    largest = largest_inputs(graph, calibration, statistics)  # each [K]
    squares = {
        one.linear.name: statistics[one.places[0]].mean_square.numpy()
        for one in placed.values()
        if one.linear.name in largest
    }  # each [K]
    divided = 0
    before, after = 0.0, 0.0
    for site in scale_sites(graph):
        names = [linear.name for linear in site.consumers]
        own = all(len(list(linear.weight.uses())) == 1 for linear in site.consumers)
        if not own or (site.cached and not cached):
            continue
        if any(linear.node not in placed or linear.name not in largest for linear in site.consumers):
            continue
        weights = np.max([_columns(graph.weights[name]) for name in names], axis=0)  # [K]
        factors = smoothing_factors(largest[names[0]], weights, site.groups)
        before, after = before + _spread(largest[names[0]]), after + _spread(largest[names[0]] / factors)
        for name in names:
            graph.weights[name] = scaled_columns(graph.weights[name], factors)
            largest[name] = largest[name] / factors
            squares[name] = squares[name] / factors**2
        site.divide(factors)
        divided += 1
    beyond = 0
    for name, values in largest.items():
        if rounding_noise(graph.weights[name], float(values.max()), squares[name]) > MOST_NOISE:
            beyond += 1
        else:
            graph.input_ranges[name] = float(values.max())
    note_experts(graph, calibration, statistics)
    figures: dict[str, float | int | str | bool] = {
        "smoothed_inputs": divided,
        "products": len(largest),
        "beyond_one_scale": beyond,
    }
    if divided:
        figures |= {"largest_over_median": before / divided, "smoothed_largest_over_median": after / divided}
    return calibration.evidence("activations smoothed", figures)


def smoothing_factors(inputs: Array, weights: Array, groups: Array | None = None) -> Array:
    """The factors [K] for features of these largest magnitudes [K] in inputs and weights.

    `groups` [K]: features of the same number get the same factor.
    """
    if groups is not None:
        inputs, weights = _of_groups(inputs, groups), _of_groups(weights, groups)
    if not inputs.max(initial=0) or not weights.max(initial=0):
        return np.ones(len(inputs), np.float32)
    x = np.maximum(inputs, inputs.max() * LEAST)
    w = np.maximum(weights, weights.max() * LEAST)
    factors: Array = (x**EXPONENT / w ** (1 - EXPONENT)).astype(np.float32)
    return factors


def rounding_noise(weight: Weight, largest: float, squares: Array) -> float:
    """What rounding an input in 254 steps of up to `largest` adds to a product, as a part of the product's mean square.

    `weight` [N, K], `squares` [K]: the mean square of each feature. Features are taken as independent, and the error
    of each as even within a step.
    """
    energies = np.sum([np.square(block, dtype=np.float64).sum(0) for block in weight.blocks()], axis=0)  # [K]
    output = float(energies @ squares)
    return (largest / 127) ** 2 / 12 * float(energies.sum()) / output if output else 0.0


def _of_groups(values: Array, groups: Array) -> Array:
    largest = np.zeros(int(groups.max()) + 1, values.dtype)
    np.maximum.at(largest, groups, values)
    result: Array = largest[groups]
    return result


def _columns(weight: Weight) -> Array:
    """The largest magnitude of each column [K], block by block."""
    result: Array = np.max([np.abs(block).max(0) for block in weight.blocks()], axis=0)
    return result


def _spread(largest: Array) -> float:
    """How far the largest feature is above the usual one."""
    return float(largest.max() / max(np.median(largest), np.finfo(np.float32).tiny))
