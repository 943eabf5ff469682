"""Codes that are fitted to calibration text, layer by layer: what is rounded first is what the next layers see."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from fmedge_runtimes.errors import ExportError, SourceError
from fmedge_runtimes.manifest import Evidence

from fmedge_converters.calibration.awq import searched_scales
from fmedge_converters.calibration.calibration import Calibration, Report
from fmedge_converters.calibration.fitted import FittedMatrices
from fmedge_converters.calibration.gptq import compensated_blocks, output_error
from fmedge_converters.calibration.linear_inputs import Inputs, Place
from fmedge_converters.calibration.places import (
    PlacedLinear,
    PlacedStack,
    placed_heads,
    placed_linears,
    placed_stacks,
)
from fmedge_converters.calibration.scale_sites import ScaleSite, scale_sites
from fmedge_converters.graph import DecoderGraph
from fmedge_converters.passes.linear import Linear
from fmedge_converters.passes.mixture import expert_linears
from fmedge_converters.rounding import RoundedBlocks, Rounding, joined, round_blocks
from fmedge_converters.scales import torch_scale_dtype
from fmedge_converters.weight import Weight, concatenated

EXPERT_TOKENS = 64
"""An expert that fewer tokens reach is fitted to those of all experts of its layer."""
SMALLEST_BLOCK = 16
HEAD_BYTES = 64 << 20
"""Of the rows of a head in fp32 that are rounded at once."""

RoundMatrix = Callable[[torch.Tensor, torch.Tensor, Rounding, torch.dtype], RoundedBlocks]
"""Rounds a matrix [N, K] whose inputs have a Gram matrix [K, K]."""


def fit_gptq(
    graph: DecoderGraph, calibration: Calibration, rounding: Callable[[Weight], Rounding] | None, report: Report
) -> Evidence:
    """GPTQ for all matrices in the layers, and for the head where its lookups are known (gptq.py)."""
    return _fit(graph, calibration, rounding, report, "GPTQ", compensated_blocks, scaled=False)


def fit_awq(
    graph: DecoderGraph, calibration: Calibration, rounding: Callable[[Weight], Rounding] | None, report: Report
) -> Evidence:
    """AWQ where the graph has places for scales, and rounding by importance for all (awq.py)."""
    return _fit(graph, calibration, rounding, report, "AWQ", _weighted, scaled=True)


def _weighted(
    matrix: torch.Tensor, gram: torch.Tensor, rounding: Rounding, scale_dtype: torch.dtype = torch.float32
) -> RoundedBlocks:
    return round_blocks(matrix, rounding, gram.diagonal(), scale_dtype)


def _fit(
    graph: DecoderGraph,
    calibration: Calibration,
    rounding: Callable[[Weight], Rounding] | None,
    report: Report,
    method: str,
    round_matrix: RoundMatrix,
    *,
    scaled: bool,
) -> Evidence:
    if rounding is None:
        raise RuntimeError(f"{method} for a scheme without blocks")
    linears, stacks = placed_linears(graph, calibration.parameters), placed_stacks(graph, calibration.parameters)
    wanted = {place: rounding(graph.weights[one.linear.name]) for one in linears for place in one.places}
    wanted |= _of_experts(graph, stacks, rounding)
    if not wanted:
        raise ExportError(
            f"no matrix of this model can be fitted by {method}: those of a source that is quantized already keep "
            "their codes; use --quantize int4."
        )
    sites = _sites(graph, linears) if scaled else {}
    dtype = next((graph.weights[one.linear.name].dtype for one in linears), np.dtype(np.float32))
    layers = _Layers(wanted, sites, round_matrix, FittedMatrices(calibration.scratch), torch_scale_dtype(dtype))
    heads = [] if scaled or calibration.lookups is None else placed_heads(graph)
    reaching = Inputs(graph.weights[heads[0].name].shape[1]) if heads else None
    calibration.fit(layers.fit, report, reaching)
    if not len(layers.fitted):
        raise SourceError(
            f"PyTorch runs none of this model's matrices in its layers, so {method} has nothing to look at."
        )
    figures: dict[str, float | int | str | bool] = {"matrices": len(layers.fitted), "of": len(wanted)}
    _apply(graph, linears, stacks, layers)
    if reaching is not None and reaching.gram is not None:
        for head in heads:
            _fit_head(graph, head, rounding(graph.weights[head.name]), reaching, calibration, layers)
        figures["head"] = "fitted, too"
    if stacks:
        figures["experts_fitted_together"] = layers.pooled
    if scaled:
        figures["scaled_inputs"] = len(layers.scales)
    figures |= (
        {"plain_error": layers.plain / layers.total, "error": layers.error / layers.total} if layers.total else {}
    )
    return calibration.evidence(f"weights fitted by {method}", figures)


def _fit_head(
    graph: DecoderGraph, head: Linear, rounding: Rounding, inputs: Inputs, calibration: Calibration, layers: _Layers
) -> None:
    """Round a head, or a part of it, to what reaches it, and a tied one to the lookups of tokens, too."""
    weight = graph.weights[head.name]
    rows, size = weight.shape
    gram = torch.zeros(size, size) if inputs.gram is None else inputs.gram / max(1, inputs.tokens)
    if calibration.lookups is not None and any(use.node.op_type == "Gather" for use in head.weight.uses()):
        gram += torch.from_numpy(calibration.lookups)
    step = max(1, HEAD_BYTES // (4 * size))
    parts = [
        layers.round_matrix(
            torch.from_numpy(weight.read(start, min(start + step, rows))).float(), gram, rounding, layers.scale_dtype
        )
        for start in range(0, rows, step)
    ]
    place = Place(head.name)
    layers.fitted.add(place, joined(parts), (rows, size))
    graph.weights[head.name] = layers.fitted.weight(place, weight.dtype)


def _of_experts(
    graph: DecoderGraph, stacks: Sequence[PlacedStack], rounding: Callable[[Weight], Rounding]
) -> dict[Place, Rounding]:
    """Of all experts: one size of blocks that divides all of their sizes, which one operator for a mixture needs."""
    if not stacks:
        return {}
    sizes = [item.weight.shape[2] for item in expert_linears(graph)]
    found: dict[Place, Rounding] = {}
    for stack in stacks:
        own = rounding(graph.weights[stack.name])
        block = math.gcd(own.block_size, *sizes) if own.block_size else 0
        if not block or block >= SMALLEST_BLOCK:
            found |= dict.fromkeys(stack.places, replace(own, block_size=block))
    return found


def _sites(graph: DecoderGraph, linears: Sequence[PlacedLinear]) -> dict[Place, ScaleSite]:
    """The site of each matrix whose input can be scaled, if all matrices with that input are to be rounded."""
    placed = {one.linear.node: one for one in linears}
    found: dict[Place, ScaleSite] = {}
    for site in scale_sites(graph):
        consumers = [placed.get(linear.node) for linear in site.consumers]
        known = [one for one in consumers if one is not None]
        # A weight that other products have, too, cannot be scaled for some of them.
        alone = all(len(list(one.linear.weight.uses())) == 1 for one in known)
        if alone and len(known) == len(consumers):
            found.update({place: site for one in known for place in one.places})
    return found


@dataclass(slots=True)
class _Layers:
    """What was fitted so far."""

    wanted: Mapping[Place, Rounding]
    sites: Mapping[Place, ScaleSite]
    round_matrix: RoundMatrix
    fitted: FittedMatrices
    scale_dtype: torch.dtype
    scales: dict[int, torch.Tensor] = field(default_factory=dict)
    """Factors [K] of the input features, by the identity of their site."""
    pooled: int = 0
    plain: float = 0.0
    """The squared error of the products with plain rounding, over all matrices."""
    error: float = 0.0
    total: float = 0.0
    """The square of the products themselves."""

    def fit(self, records: list[Inputs], parameters: Mapping[str, torch.Tensor]) -> None:
        """Round the matrices of a layer."""
        for inputs in [
            *(record for record in records if not self._is_rare(record)),
            *self._together(records, parameters),
        ]:
            asked = {place: matrix for place, matrix in inputs.matrices.items() if place in self.wanted}
            known = {
                place: matrix for place, matrix in asked.items() if matrix is not None and place not in self.fitted
            }
            if known and inputs.gram is not None:
                self._round(known, inputs, inputs.gram / max(1, inputs.tokens))

    def _round(self, matrices: Mapping[Place, torch.Tensor], inputs: Inputs, gram: torch.Tensor) -> None:
        factors = self._scales(matrices, inputs, gram)
        scaled_gram = gram / torch.outer(factors, factors)
        for place, matrix in matrices.items():
            rounding = self.wanted[place]
            whole = matrix * factors
            rounded = self.round_matrix(whole, scaled_gram, rounding, self.scale_dtype)
            found = rounded.dequantized(matrix.shape[1])
            plain = round_blocks(matrix, replace(rounding, search=False)).dequantized(matrix.shape[1])
            tokens = max(1, inputs.tokens)
            self.plain += tokens * output_error(matrix, plain, gram)
            self.error += tokens * output_error(whole, found, scaled_gram)
            self.total += tokens * output_error(matrix, torch.zeros_like(matrix), gram)
            self.fitted.add(place, rounded, (matrix.shape[0], matrix.shape[1]))
            matrix.copy_(found / factors)

    def _scales(self, matrices: Mapping[Place, torch.Tensor], inputs: Inputs, gram: torch.Tensor) -> torch.Tensor:
        ones = torch.ones(inputs.size)
        sites = {id(self.sites[place]): self.sites[place] for place in inputs.matrices if place in self.sites}
        if len(sites) != 1 or not all(place in self.sites and place in matrices for place in inputs.matrices):
            return ones
        ((identity, site),) = sites.items()
        if {place for place, other in self.sites.items() if other is site} != set(inputs.matrices):
            return ones
        groups = None if site.groups is None else torch.from_numpy(site.groups)
        roundings = [self.wanted[place] for place in matrices]
        self.scales[identity] = searched_scales(list(matrices.values()), inputs.mean_square, gram, roundings, groups)
        return self.scales[identity]

    @staticmethod
    def _is_rare(inputs: Inputs) -> bool:
        experts = all(place.expert is not None for place in inputs.matrices)
        return experts and inputs.tokens < EXPERT_TOKENS

    def _together(self, records: list[Inputs], parameters: Mapping[str, torch.Tensor]) -> list[Inputs]:
        """The experts that few tokens reach, or none, with the inputs of all experts of their parameter."""
        found = []
        names = dict.fromkeys(place.parameter for place in self.wanted if place.expert is not None)
        for name in (name for name in names if name in parameters):
            alike = [one for one in records if any(place.parameter == name for place in one.matrices)]
            if not alike:
                continue
            often = {place for one in alike if not self._is_rare(one) for place in one.matrices}
            whole = Inputs(alike[0].size)
            whole.tokens = sum(one.tokens for one in alike)
            whole.squares = torch.stack([one.squares for one in alike]).sum(0)
            whole.gram = torch.zeros(whole.size, whole.size)
            for one in alike:
                whole.gram += 0 if one.gram is None else one.gram
            rare = [place for place in self.wanted if place.parameter == name and place not in often]
            whole.matrices = {place: parameters[name][place.expert or 0].detach() for place in rare}
            self.pooled += len(rare)
            found.append(whole)
        return found


def _apply(
    graph: DecoderGraph, linears: Sequence[PlacedLinear], stacks: Sequence[PlacedStack], layers: _Layers
) -> None:
    """Give the graph the codes, and divide what was scaled."""
    for one in linears:
        if all(place in layers.fitted for place in one.places):
            dtype = graph.weights[one.linear.name].dtype
            graph.weights[one.linear.name] = concatenated([layers.fitted.weight(place, dtype) for place in one.places])
    for stack in stacks:
        if all(place in layers.fitted for place in stack.places):
            graph.weights[stack.name] = layers.fitted.stack(stack.places, graph.weights[stack.name].dtype)
    for site in {id(site): site for site in layers.sites.values()}.values():
        if id(site) in layers.scales:
            site.divide(layers.scales[id(site)].numpy())
