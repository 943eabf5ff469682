"""Spell every weight of a graph by a scheme: the experts, the linears, the head, the token embedding.

With a budget of bits, linears whose roundings have known costs get those that cost least together.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fmedge_runtimes.errors import ExportError

from fmedge_converters.graph import DecoderGraph
from fmedge_converters.mixed_precision import Allocation, Matrix, Option, allocate
from fmedge_converters.passes.experts import expand_experts
from fmedge_converters.passes.linear import Linear, linears
from fmedge_converters.passes.mixture import expert_linears, mixtures
from fmedge_converters.rounding import Rounding
from fmedge_converters.schemes.floating import FLOATING
from fmedge_converters.schemes.scheme import Embedding, RoundsWeight, Scheme
from fmedge_converters.weight import Weight


@dataclass(frozen=True, slots=True)
class Quantization:
    """What became of a graph's matrices. Those of all experts count as one where one operator has them."""

    matrices: int
    kept: int
    """Those that have the codes of their source."""
    block_size: int | None
    """Weights that share a scale, in most of them; None for a scheme without blocks."""
    bits_per_weight: float | None
    """In the file, scales and zero points included; None for a scheme without blocks."""
    allocation: Allocation | None
    """What was chosen for each matrix, if there was a budget."""


def quantize(graph: DecoderGraph, scheme: Scheme, block_size: int | None, bits: float | None = None) -> Quantization:
    """Replace mixtures of experts, Linear nodes and the lookup of tokens. The last Linear of a decoder is its head.

    `block_size` None takes the scheme's own, and what the source has; `bits` is a budget per weight. Raises ExportError
    when a size is asked for, and matrices that keep the codes of their source have another, and when the budget
    cannot be kept.
    """
    size = block_size or scheme.block_size
    experts = {item.name: item.weight for item in expert_linears(graph)}
    for mixture in mixtures(graph):
        if scheme.mixture is not None:
            scheme.mixture(graph, mixture, block_size=size)
    for item in expert_linears(graph):  # those that the scheme has left
        del experts[item.name]
    expand_experts(graph)
    projections = linears(graph)
    head = projections[-1] if projections else None
    embeddings = _embeddings(graph)
    tied = {embedding.node: head is not None and head.weight is embedding.weight for embedding in embeddings}
    rounded = [linear.name for linear in projections if not linear.exact]
    names = dict.fromkeys([*rounded, *(str(embedding.weight.name) for embedding in embeddings)])
    weights = [*experts.values(), *(graph.weights[name] for name in names)]
    packed = [weight.packed for weight in weights if weight.packed is not None]
    kept = [one for one in packed if one.of_source]
    sizes = Counter(one.block_size for one in kept)
    if block_size is not None and sizes and set(sizes) != {block_size}:
        raise ExportError(
            f"--block-size {block_size} contradicts the source: it is quantized already, and its matrices keep their "
            f"codes, in blocks of {' and '.join(map(str, sorted(sizes)))}; leave the option out."
        )
    sizes += Counter(one.block_size for one in packed if not one.of_source)
    allocation: Allocation | None = None
    bits_per_weight: float | None = None
    if scheme.rounding is not None:
        matrices = [
            *_kernels(graph, list(experts.values())),
            *_matrices(graph, scheme.rounding, [linear for linear in projections if not linear.exact], head, size),
            *(
                _lookups(graph, scheme.rounding, embeddings, head, size)
                if scheme.lookup_bits is None
                else _floating_lookups(graph, scheme.lookup_bits, embeddings, head)
            ),
        ]
        if bits is not None:
            allocation = allocate(matrices, bits)
            for matrix, option in zip(allocation.matrices, allocation.chosen, strict=True):
                if option.rounding is not None:
                    graph.weights[matrix.name] = dataclasses.replace(
                        graph.weights[matrix.name], rounding=option.rounding
                    )
        as_is = Allocation(tuple(matrices), tuple(matrix.options[0] for matrix in matrices))
        bits_per_weight = (allocation or as_is).bits_per_weight
        roundings = [option.rounding for option in (allocation or as_is).chosen]
        sizes += Counter(rounding.block_size for rounding in roundings if rounding is not None)
    sizes[size] += len(weights) - sizes.total()
    # Last first: what a Linear reads may be the output of another, which is replaced in its turn.
    for linear in reversed(projections):
        spell = FLOATING.linear if linear.exact else scheme.linear
        spell(graph, linear, is_head=linear is head, block_size=size)
    for embedding in embeddings:
        scheme.embedding(graph, embedding, tied=tied[embedding.node], block_size=size)
    graph.remove_unused()
    return Quantization(
        len(weights), len(kept), sizes.most_common(1)[0][0] or None if sizes else None, bits_per_weight, allocation
    )


def _kernels(graph: DecoderGraph, experts: Sequence[Weight]) -> Iterator[Matrix]:
    """The experts that kernels have, all as one; their codes, scales and zero points are the inputs of rank 3."""
    inputs = [graph.weight(value) for node in graph.graph if node.op_type == "QMoE" for value in node.inputs]
    size = sum(weight.nbytes for weight in inputs if weight is not None and len(weight.shape) == 3)
    if size:
        yield Matrix("experts", sum(math.prod(weight.shape) for weight in experts), (Option(None, size * 8, 0.0),))


def _matrices(
    graph: DecoderGraph, rounds: RoundsWeight, projections: Sequence[Linear], head: Linear | None, block_size: int
) -> Iterator[Matrix]:
    """Each weight of a Linear once. The first option is the scheme's own."""
    seen = set()
    for linear in projections:
        if linear.name in seen:
            continue
        seen.add(linear.name)
        weight = graph.weights[linear.name]
        usual = rounds(weight, is_head=linear is head, block_size=block_size)
        options = _options(weight, usual)
        # A scheme rounds otherwise what it cannot express.
        expressible = [
            option
            for option in options
            if option.rounding is None
            or option.rounding
            == rounds(
                dataclasses.replace(weight, rounding=option.rounding), is_head=linear is head, block_size=block_size
            )
        ]
        yield Matrix(linear.name, math.prod(weight.shape), tuple(expressible))


def _lookups(
    graph: DecoderGraph,
    rounds: RoundsWeight,
    embeddings: Sequence[Embedding],
    head: Linear | None,
    block_size: int,
) -> Iterator[Matrix]:
    """Embeddings that have a matrix of their own."""
    for name in dict.fromkeys(str(embedding.weight.name) for embedding in embeddings):
        if head is None or head.name != name:
            weight = graph.weights[name]
            usual = rounds(weight, is_head=True, block_size=block_size)
            yield Matrix(name, math.prod(weight.shape), _options(dataclasses.replace(weight, costs=()), usual))


def _floating_lookups(
    graph: DecoderGraph, bits: int, embeddings: Sequence[Embedding], head: Linear | None
) -> Iterator[Matrix]:
    """Embeddings, which are not rounded. The numbers of one that the head has, too, are counted there."""
    for name in dict.fromkeys(str(embedding.weight.name) for embedding in embeddings):
        numbers = math.prod(graph.weights[name].shape)
        tied = head is not None and head.name == name
        yield Matrix(name, 0 if tied else numbers, (Option(None, numbers * bits, 0.0),))


def _options(weight: Weight, usual: Rounding) -> tuple[Option, ...]:
    rows, size = weight.shape
    packed = weight.packed
    if packed is not None:
        kept = Rounding(packed.bits, packed.block_size, symmetric=packed.zero_points is None)
        return (Option(None, kept.stored_bits(rows, size, weight.dtype.itemsize * 8), 0.0),)
    costs = {cost.rounding: cost.divergence for cost in weight.costs}
    roundings = [usual, *(rounding for rounding in costs if rounding != usual)] if costs else [usual]
    return tuple(
        Option(rounding, rounding.stored_bits(rows, size), costs.get(rounding, 0.0))
        for rounding in roundings
        if rounding in costs or not costs
    )


def _embeddings(graph: DecoderGraph) -> list[Embedding]:
    found = []
    for node in graph.graph:
        if node.op_type != "Gather" or node.domain or node.attributes.get_int("axis", 0) != 0:
            continue
        weight, ids = node.inputs
        known = graph.weight(weight)
        if (
            weight is not None
            and ids is not None
            and known is not None
            and ids.name == "input_ids"
            and len(known.shape) == 2
        ):
            found.append(Embedding(node, weight, ids, node.outputs[0]))
    return found
