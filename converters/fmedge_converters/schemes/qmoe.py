"""com.microsoft::QMoE: a whole mixture of experts in one node, its weights rounded to 4 or 8 bits in blocks.

The operator chooses the k largest of `router_probs`; given the model's own weights, scattered over all experts, that
is what the model chose, and `router_weights` are the weights themselves. It drops a weight that is not positive, so a
mixture whose weights could be negative keeps its plain form; so does one with an activation that the kernel lacks.
Codes are those of MatMulNBits (weight_only.py), or the source's own if it is quantized and both products agree in bits
and block size. The rows of a gate and of its linear part alternate.
Operator: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

import functools
import math

import numpy as np
import onnx_ir as ir

from fmedge_converters.graph import MICROSOFT, DecoderGraph, replace
from fmedge_converters.passes.expert_activation import Activation, activation_between
from fmedge_converters.passes.mixture import ExpertLinear, Mixture, expert_linear
from fmedge_converters.passes.sign import never_negative
from fmedge_converters.rounding import Rounding
from fmedge_converters.scales import add_scales
from fmedge_converters.schemes.scheme import SpellMixture
from fmedge_converters.schemes.weight_only import BLOCK_SIZE, QuantizedMatrix, joined_blocks
from fmedge_converters.weight import Array, PackedMatrix, Read, Weight, selected

SMALLEST_BLOCK = 16


def _kept(up: Weight, down: Weight) -> PackedMatrix | None:
    """The form of the source's codes, if the operator can have those of both products."""
    first, second = up.packed, down.packed
    if first is None or second is None:
        return None
    alike = (first.bits, first.block_size) == (second.bits, second.block_size)
    whole = up.shape[2] % first.block_size == 0 and down.shape[2] % first.block_size == 0
    sorted_columns = first.columns is not None or second.columns is not None
    same_zeros = (first.zero_points is None) == (second.zero_points is None)
    return first if alike and whole and same_zeros and not sorted_columns else None


def _spell(
    graph: DecoderGraph,
    mixture: Mixture,
    *,
    block_size: int,
    bits: int,
    accuracy_level: int,
    zero_points: bool,
    symmetric: bool,
    search: bool,
) -> None:
    down = expert_linear(graph, mixture.rows)
    up = _before(graph, down)
    if down is None or up is None:
        return
    activation = activation_between(graph, up.output, down.rows)
    if activation is None or not never_negative(graph, mixture.weights):
        return
    if up.weight.packed is not None or down.weight.packed is not None:
        kept = _kept(up.weight, down.weight)
        if kept is None or (kept.zero_points is not None and not zero_points):
            return  # the plain form keeps the codes of each matrix
        bits, block = kept.bits, kept.block_size
    else:
        block = math.gcd(up.weight.shape[2], down.weight.shape[2], block_size or BLOCK_SIZE)
    if block < SMALLEST_BLOCK:
        return
    routing = _routing(graph, mixture, up.weight.shape[0])
    inputs: list[ir.Value | None] = [mixture.x, routing]
    zeros: list[ir.Value | None] = []
    for linear, gated in ((up, activation.gated and not activation.interleaved), (down, False)):
        *parts, zero = _weights(graph, linear, Rounding(bits, block, symmetric, search), alternate=gated)
        inputs += parts
        zeros.append(zero)
    inputs += [None] * 3 + zeros + [None, routing]
    (output,) = graph.insert(
        mixture.node,
        "QMoE",
        inputs,
        [(mixture.output.dtype, mixture.output.shape)],
        {
            "k": mixture.shape[1],
            "normalize_routing_weights": 0,
            "expert_weight_bits": bits,
            "block_size": block,
            "weights_prepacked": 0,
            **_attributes(activation),
            # Onnxruntime 1.30 does not know it.
            **({"accuracy_level": accuracy_level} if accuracy_level else {}),
        },
        MICROSOFT,
    )
    replace(mixture.output, output)
    graph.remove_unused()


def _before(graph: DecoderGraph, down: ExpertLinear | None) -> ExpertLinear | None:
    """The first product of the experts whose second is `down`: they share the sizes of their parts."""
    if down is None:
        return None
    users = [use.node.outputs[0] for use in down.sizes.uses() if use.node is not down.node]
    return expert_linear(graph, users[0]) if len(users) == 1 else None


def _attributes(activation: Activation) -> dict[str, int | float | str]:
    if not activation.gated:
        return {"activation_type": activation.name}
    limit = {} if activation.limit is None else {"swiglu_limit": activation.limit}
    return {
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "activation_alpha": activation.alpha,
        "activation_beta": activation.beta,
        **limit,
    }


def _routing(graph: DecoderGraph, mixture: Mixture, experts: int) -> ir.Value:
    """The weights [T, k] at their experts' places in a row of zeros [T, E]."""
    node, dtype = mixture.node, mixture.weights.dtype
    if dtype is None:
        raise RuntimeError(f"the routing weights {mixture.weights.name} have no type")
    like = [(dtype, [mixture.shape[0], experts])]
    (rows,) = graph.insert(node, "Shape", (mixture.index,), [(ir.DataType.INT64, [1])], {"end": 1})
    columns = graph.add_constant(f"experts.{experts}", np.array([experts], np.int64))
    (shape,) = graph.insert(node, "Concat", (rows, columns), [(ir.DataType.INT64, [2])], {"axis": 0})
    (zeros,) = graph.insert(node, "ConstantOfShape", (shape,), like, {"value": ir.tensor(np.zeros(1, dtype.numpy()))})
    (routing,) = graph.insert(node, "ScatterElements", (zeros, mixture.index, mixture.weights), like, {"axis": 1})
    return routing


def _weights(
    graph: DecoderGraph, linear: ExpertLinear, rounding: Rounding, *, alternate: bool
) -> list[ir.Value | None]:
    """Initializers: codes, scales, bias, zero points; `alternate` puts the rows' second half between the first."""
    weight, bias = linear.weight, linear.bias
    if alternate:
        order = np.arange(weight.shape[1]).reshape(2, -1).T.reshape(-1)  # [N]
        weight = selected(weight, 1, order)
        bias = None if bias is None else selected(bias, 1, order)
    experts, rows, size = weight.shape
    bits, blocks = rounding.bits, size // rounding.block_size
    stem, zeros = f"{linear.name}.int{bits}", None
    if weight.packed is None:
        made = QuantizedMatrix(weight, rounding)
        codes, scales, zeros = joined_blocks(made.codes), made.scales, made.zero_points
    else:
        packed, byte = weight.packed, np.dtype(np.uint8)
        codes = _by_expert(packed.codes, byte, (experts, rows, size * bits // 8))
        scales = _by_expert(packed.scales, packed.scale_dtype or weight.dtype, (experts, rows, blocks))
        if packed.zero_points is not None:
            zeros = _by_expert(packed.zero_points, byte, (experts, rows, -(-blocks * bits // 8)))
    return [
        graph.add_weight(f"{stem}.codes", codes),
        add_scales(graph, f"{stem}.scales", scales, weight.dtype),
        None if bias is None else graph.add_weight(f"{linear.name}.bias", bias),
        None if zeros is None else graph.add_weight(f"{stem}.zero_points", zeros),
    ]


def _by_expert(read: Read, dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> Weight:
    """Packed rows [E * N, ...] as [E, N, row]."""
    rows = shape[1]

    def read_experts(start: int, stop: int) -> Array:
        return np.ascontiguousarray(read(start * rows, stop * rows)).reshape(stop - start, *shape[1:])

    return Weight(shape, dtype, read_experts)


def qmoe(
    bits: int, accuracy_level: int = 0, *, zero_points: bool = False, symmetric: bool = True, search: bool = True
) -> SpellMixture:
    """Mixtures as QMoE. `accuracy_level` 4 lets the CPU multiply 4-bit weights in int8; with 8 bits it always does.
    `zero_points` says that the target's kernel has them, for a source that does; `symmetric` and `search` are those of
    Rounding, for others.
    """
    return functools.partial(
        _spell, bits=bits, accuracy_level=accuracy_level, zero_points=zero_points, symmetric=symmetric, search=search
    )
