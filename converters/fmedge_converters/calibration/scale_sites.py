"""Places in a graph where input features of products can be scaled for nothing.

A product's weights are multiplied by a factor for each input feature, and what computes its input is divided by the
same factors, in weights that are there anyway: those of a norm, or the rows of the projection that an elementwise
product took in (up in front of down), or the rows of the values that attention adds up (v in front of o). Up to the
rounding of floating-point numbers the graph computes the same. A site is only what the graph shows to be one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from fmedge_converters.graph import MICROSOFT, DecoderGraph, constant, dims, produced_by
from fmedge_converters.passes.linear import Linear, linears
from fmedge_converters.weight import Array, Read, Weight, weight_from_array

NORMS = {
    ("SimplifiedLayerNormalization", ""): (1,),
    ("SkipSimplifiedLayerNormalization", MICROSOFT): (2,),
    ("RMSNormalization", ""): (1,),
    ("LayerNormalization", ""): (1, 2),
}
"""Operators, and which of their inputs multiply or are added to what they return."""
LARGEST = 1 << 20
"""Elements of a norm's weight that is a constant."""


@dataclass(frozen=True, slots=True)
class ScaleSite:
    """Products with the same input [..., K], and how to divide that."""

    consumers: tuple[Linear, ...]
    divide: Callable[[Array], None]
    """Divides the input's features by factors [K]; the consumers' weights are the caller's business."""
    groups: Array | None = None
    """int64 [K]: features of the same number must have the same factor; None: each has its own."""
    cached: bool = False
    """Whether what is divided goes into the cache, which other graphs may have, too."""


def scale_sites(graph: DecoderGraph) -> list[ScaleSite]:
    """All sites of a graph with Linear nodes, after its projections were merged."""
    by_input: dict[ir.Value, list[Linear]] = {}
    for linear in linears(graph):
        by_input.setdefault(linear.x, []).append(linear)
    producers = {linear.output: linear for linear in linears(graph)}
    sites = []
    for x, consumers in by_input.items():
        nodes = {linear.node for linear in consumers}
        if x.is_graph_output() or any(use.node not in nodes for use in x.uses()):
            continue
        if any(linear.exact for linear in consumers):
            continue
        source = _unshaped(x)
        site = (
            _behind_norm(graph, source, consumers)
            or _behind_vector(graph, source, consumers)
            or _behind_product(graph, source, consumers, producers)
            or _behind_attention(graph, source, consumers, producers)
            or _behind_written_attention(graph, source, consumers, producers)
        )
        if site is not None:
            sites.append(site)
    return sites


def _unshaped(value: ir.Value) -> ir.Value:
    """What a value was before it was reshaped, for nobody else, in ways that leave its last axis as it is."""
    node = produced_by(value, "Reshape")
    before = None if node is None else node.inputs[0]
    if before is None or before.is_graph_output() or len(list(before.uses())) != 1:
        return value
    last, was = (dims(value) or [""])[-1:], (dims(before) or [""])[-1:]
    return _unshaped(before) if last == was and isinstance(last[0], int) else value


def scaled_columns(weight: Weight, factors: Array) -> Weight:
    """A matrix [N, K] with each column times its factor [K]; without the codes of a source."""

    def read(start: int, stop: int) -> Array:
        return (weight.read(start, stop) * factors).astype(weight.dtype)

    return Weight(weight.shape, weight.dtype, read, step=weight.step)


def scaled_rows(weight: Weight, factors: Array) -> Weight:
    """A matrix [N, K], or a bias [N], with each row times its factor [N]; codes stay, their scales are multiplied."""

    def scaled(read: Read) -> Read:
        def read_scaled(start: int, stop: int) -> Array:
            rows = read(start, stop)
            part = factors[start:stop].reshape(-1, *[1] * (rows.ndim - 1))
            return (rows * part).astype(rows.dtype)

        return read_scaled

    packed = weight.packed
    if packed is not None:
        packed = replace(packed, scales=scaled(packed.scales))
    return Weight(weight.shape, weight.dtype, scaled(weight.read), packed, weight.step)


def _behind_norm(graph: DecoderGraph, x: ir.Value, consumers: list[Linear]) -> ScaleSite | None:
    node = x.producer()
    if node is None or node.outputs[0] is not x:
        return None
    places = NORMS.get((node.op_type, node.domain))
    if places is None:
        return None
    size = graph.weights[consumers[0].name].shape[1]
    parts = [place for place in places if place < len(node.inputs) and node.inputs[place] is not None]
    arrays = [_vector(graph, node.inputs[place]) for place in parts]
    found = [array for array in arrays if array is not None and array.shape == (size,)]
    if len(found) != len(parts) or not found:
        return None

    def divide(factors: Array) -> None:
        for place, array in zip(parts, found, strict=True):
            value = (array.astype(np.float64) / factors).astype(array.dtype)
            # The weight may be that of other norms, too.
            name = f"{consumers[0].name}.input.{place}"
            node.replace_input_with(place, graph.add_weight(name, weight_from_array(value)))

    return ScaleSite(tuple(consumers), divide)


def _behind_vector(graph: DecoderGraph, x: ir.Value, consumers: list[Linear]) -> ScaleSite | None:
    """A product with a vector [K], which may be computed: the last step of a norm that is written out."""
    cast = produced_by(x, "Cast")
    source = None if cast is None else cast.inputs[0]
    if source is not None and len(list(source.uses())) == 1 and not source.is_graph_output():
        x = source
    product = produced_by(x, "Mul")
    size = graph.weights[consumers[0].name].shape[1]
    if product is None or (dims(x) or [""])[-1] != size:
        return None
    place = next((place for place, value in enumerate(product.inputs) if value and dims(value) == [size]), None)
    if place is None:
        return None

    def divide(factors: Array) -> None:
        name, vector = f"{consumers[0].name}.input", product.inputs[place]
        known = _vector(graph, vector)
        if known is not None:
            value = weight_from_array((known.astype(np.float64) / factors).astype(known.dtype))
            product.replace_input_with(place, graph.add_weight(f"{name}.{place}", value))
            return
        if vector is None or vector.dtype is None:
            raise RuntimeError(f"the vector in front of {consumers[0].name} has no type")
        inverse = graph.add_constant(f"{name}.inverse", (1 / factors.astype(np.float64)).astype(vector.dtype.numpy()))
        (divided,) = graph.insert(product, "Mul", (vector, inverse), [(vector.dtype, vector.shape)])
        product.replace_input_with(place, divided)

    return ScaleSite(tuple(consumers), divide)


def _vector(graph: DecoderGraph, value: ir.Value | None) -> Array | None:
    weight = graph.weight(value)
    return constant(value, LARGEST) if weight is None else weight.array()


@dataclass(frozen=True, slots=True)
class _Rows:
    """A range of the rows of a product, which are features of what it returns."""

    linear: Linear
    start: int
    stop: int


def _behind_product(
    graph: DecoderGraph, x: ir.Value, consumers: list[Linear], producers: dict[ir.Value, Linear]
) -> ScaleSite | None:
    """A product of two values, one of which a projection returned."""
    product = produced_by(x, "Mul")
    if product is None:
        return None
    size = graph.weights[consumers[0].name].shape[1]
    for value in reversed(list(product.inputs)):
        if value is None or len(list(value.uses())) != 1 or value.is_graph_output():
            continue
        rows = _rows_behind(graph, value, producers)
        if rows is not None and rows.stop - rows.start == size and _scalable(graph, rows):
            return ScaleSite(tuple(consumers), functools.partial(_divide_rows, graph, rows))
    return None


def _rows_behind(graph: DecoderGraph, value: ir.Value, producers: dict[ir.Value, Linear]) -> _Rows | None:
    """The rows of the projection whose output, or part of it, a value is."""
    value = _unshaped(value)
    if value in producers:
        linear = producers[value]
        return _Rows(linear, 0, graph.weights[linear.name].shape[0])
    split = produced_by(value, "Split")
    if split is None or split.inputs[0] is None or _unshaped(split.inputs[0]) not in producers:
        return None
    if len(list(split.inputs[0].uses())) != 1 or split.inputs[0].is_graph_output():
        return None
    linear = producers[_unshaped(split.inputs[0])]
    rank = len(dims(split.inputs[0]) or ())
    if split.attributes.get_int("axis", 0) not in (-1, rank - 1):
        return None
    sizes = [dim for output in split.outputs for dim in (dims(output) or [""])[-1:] if isinstance(dim, int)]
    if len(sizes) != len(split.outputs) or sum(sizes) != graph.weights[linear.name].shape[0]:
        return None
    ends = np.cumsum([0, *sizes]).tolist()
    place = list(split.outputs).index(value)
    return _Rows(linear, ends[place], ends[place + 1])


def _behind_attention(
    graph: DecoderGraph, x: ir.Value, consumers: list[Linear], producers: dict[ir.Value, Linear]
) -> ScaleSite | None:
    """What attention made of values that a projection returned; heads that share values share factors."""
    node = x.producer()
    if node is None or node.op_type != "GroupQueryAttention" or node.domain != MICROSOFT or node.outputs[0] is not x:
        return None
    heads, shared = (node.attributes.get_int(name, 0) for name in ("num_heads", "kv_num_heads"))
    size = graph.weights[consumers[0].name].shape[1]
    if not heads or not shared or size % heads:
        return None
    width = size // heads
    packed, values = node.inputs[0], node.inputs[2]
    if values is None:
        whole = None if packed is None else _rows_behind(graph, packed, producers)
        if whole is None or whole.stop - whole.start != (heads + 2 * shared) * width:
            return None
        rows = _Rows(whole.linear, whole.stop - shared * width, whole.stop)
        fed = packed
    else:
        found = _rows_behind(graph, values, producers)
        if found is None or found.stop - found.start != shared * width:
            return None
        rows, fed = found, values
    if fed is None or len(list(fed.uses())) != 1 or not _scalable(graph, rows):
        return None
    return _of_values(graph, consumers, rows, (heads, shared, width))


def _behind_written_attention(
    graph: DecoderGraph, x: ir.Value, consumers: list[Linear], producers: dict[ir.Value, Linear]
) -> ScaleSite | None:
    """The same where attention is ONNX's operator, or a product with the values, over a cache [B, shared, C, width]
    that new values are written to."""
    together = produced_by(x, "Reshape")  # [B, S, heads * width]
    by_head = _swapped(None if together is None else together.inputs[0])  # [B, heads, S, width]
    if by_head is None:
        return None
    heads = (dims(by_head) or ["", ""])[1]
    attention, place = produced_by(by_head, "Attention"), 2
    if attention is None:
        grouped = produced_by(by_head, "Reshape")
        attention, place = produced_by(None if grouped is None else grouped.inputs[0], "MatMul"), 1
    cache = None if attention is None else attention.inputs[place]
    if cache is None or len(list(cache.uses())) != 1:
        return None
    written, update = produced_by(cache, "TensorScatter"), 1
    if written is None:
        written, update = produced_by(cache, "ScatterElements"), 2
    value = _swapped(None if written is None else written.inputs[update])  # [B, S, shared, width]
    _, _, shared, width = (None if value is None else dims(value)) or ["", "", "", ""]
    apart = produced_by(value, "Reshape")
    fed = None if apart is None else apart.inputs[0]
    size = graph.weights[consumers[0].name].shape[1]
    sizes = (heads, shared, width)
    if fed is None or not all(isinstance(item, int) for item in sizes):
        return None
    heads, shared, width = map(int, sizes)
    rows = _rows_behind(graph, fed, producers)
    if rows is None or rows.stop - rows.start != shared * width or heads * width != size or heads % shared:
        return None
    if len(list(fed.uses())) != 1 or not _scalable(graph, rows):
        return None
    return _of_values(graph, consumers, rows, (heads, shared, width))


def _swapped(value: ir.Value | None) -> ir.Value | None:
    """What a value [A, B, C, D] was as [A, C, B, D], for nobody else."""
    node = produced_by(value, "Transpose")
    if node is None or list(node.attributes.get_ints("perm", [])) != [0, 2, 1, 3]:
        return None
    return node.inputs[0] if len(list(node.outputs[0].uses())) == 1 else None


def _of_values(graph: DecoderGraph, consumers: list[Linear], rows: _Rows, sizes: tuple[int, int, int]) -> ScaleSite:
    """The site of a projection's rows that are values [shared * width], of which each serves several heads."""
    heads, shared, width = sizes
    kept = np.arange(shared * width).reshape(shared, 1, width)
    groups = np.broadcast_to(kept, (shared, heads // shared, width)).reshape(-1)  # [K]

    def divide(factors: Array) -> None:
        own = np.empty(shared * width, np.float64)
        own[groups] = factors
        _divide_rows(graph, rows, own)

    return ScaleSite(tuple(consumers), divide, np.ascontiguousarray(groups), cached=True)


def _scalable(graph: DecoderGraph, rows: _Rows) -> bool:
    """Whether a projection's weight is its own, and its bias one that can be changed."""
    if rows.linear.exact or len(list(rows.linear.weight.uses())) != 1:
        return False
    return rows.linear.bias is None or _vector(graph, rows.linear.bias) is not None


def _divide_rows(graph: DecoderGraph, rows: _Rows, factors: Array) -> None:
    weight = graph.weights[rows.linear.name]
    every = np.ones(weight.shape[0], np.float32)
    every[rows.start : rows.stop] = 1 / factors
    graph.weights[rows.linear.name] = scaled_rows(weight, every)
    if rows.linear.bias is not None:
        bias = _vector(graph, rows.linear.node.inputs[2])
        if bias is None:
            raise RuntimeError(f"the bias of {rows.linear.name} is neither a parameter nor a constant")
        # Under a name of its own, because another projection may have an equal bias.
        name = f"{rows.linear.name}.bias.{rows.start}"
        scaled = graph.add_weight(name, weight_from_array((bias * every).astype(bias.dtype)))
        rows.linear.node.replace_input_with(2, scaled)
