"""Recurrent layers in ONNX's own operators, for runtimes that have none of ONNX Runtime's.

com.microsoft::CausalConvWithState becomes a convolution of the kept columns with the new ones behind them, and
com.microsoft::LinearAttention a Scan over tokens, whose body is the recurrence of kernels/linear_attention.py in
products and sums. Prompts go through the scan token by token: exact for any length and any decay, and slower than a
kernel for whole chunks would be.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from fmedge_converters.graph import MICROSOFT, DecoderGraph, replace

LAST = np.iinfo(np.int64).max
Dims = Sequence[int | str | ir.SymbolicDim]


def decompose_recurrence(graph: DecoderGraph, _context: int) -> int:
    """Write every node of recurrent layers in plain operators; returns how many there were."""
    written = {"CausalConvWithState": _convolution, "LinearAttention": _linear_attention}
    found = [node for node in graph.graph if node.domain == MICROSOFT and node.op_type in written]
    for node in found:
        written[node.op_type](graph, node)
    graph.remove_unused()
    return len(found)


def _convolution(graph: DecoderGraph, node: ir.Node) -> None:
    new, weight, bias, kept = (*node.inputs, None, None)[:4]
    output, present = node.outputs
    batch, channels, length = _shape(new)
    assert new is not None and weight is not None and isinstance(channels, int)
    columns = _sizes(weight)[2] - 1
    if kept is None:
        pads = _integers(graph, [0, 0, columns, 0, 0, 0])
        (joined,) = graph.insert(node, "Pad", [new, pads], [(new.dtype, None)])
    else:
        (joined,) = graph.insert(node, "Concat", [kept, new], [(new.dtype, None)], {"axis": -1})
    joined.shape = ir.Shape([batch, channels, length + columns if isinstance(length, int) else f"{length} + {columns}"])
    inputs = [joined, weight] if bias is None else [joined, weight, bias]
    (convolved,) = graph.insert(node, "Conv", inputs, [(output.dtype, output.shape)], {"group": channels})
    replace(output, convolved)
    bounds = [_integers(graph, [number]) for number in (-columns, LAST, 2)]
    (tail,) = graph.insert(node, "Slice", [joined, *bounds], [(present.dtype, present.shape)])
    replace(present, tail)


def _linear_attention(graph: DecoderGraph, node: ir.Node) -> None:
    query, key, value, state, decay, beta = (*node.inputs, None)[:6]
    assert query is not None and key is not None and value is not None and state is not None and decay is not None
    output, present = node.outputs
    batch, length, _ = _shape(query)
    groups, heads = (node.attributes.get_int(name) for name in ("q_num_heads", "kv_num_heads"))
    key_size, value_size = _sizes(state)[2:]
    decays = _sizes(decay)[2] // heads
    kind, each = state.dtype, heads // groups
    assert kind is not None

    def number(wanted: float) -> ir.Value:
        return graph.add_constant(f"recurrence.{kind.name}.{wanted!r}", np.array(wanted, kind.numpy()))

    def of_tokens(given: ir.Value, *sizes: int) -> ir.Value:
        """Tokens in front, heads in groups: [S, B, G, ...]."""
        wide = (kind, [batch, length, *sizes])
        (split,) = graph.insert(node, "Reshape", [given, _integers(graph, [0, 0, *sizes])], [wide])
        perm = [1, 0, *range(2, 2 + len(sizes))]
        (turned,) = graph.insert(node, "Transpose", [split], [(kind, [length, batch, *sizes])], {"perm": perm})
        return turned

    (scaled,) = graph.insert(
        node, "Mul", [query, number(node.attributes.get_float("scale", 1.0))], [(kind, query.shape)]
    )
    (kept,) = graph.insert(node, "Exp", [decay], [(kind, decay.shape)])
    tokens = [
        of_tokens(scaled, groups, 1, key_size, 1),
        of_tokens(key, groups, 1, key_size, 1),
        of_tokens(value, groups, each, 1, value_size),
        of_tokens(kept, groups, each, decays, 1),
    ]
    if node.attributes.get_string("update_rule") == "gated_delta":
        assert beta is not None
        tokens.append(of_tokens(beta, groups, each, 1, 1))
    grouped = [groups, each, key_size, value_size]
    start_shape = _integers(graph, [0, *grouped])
    (start,) = graph.insert(node, "Reshape", [state, start_shape], [(kind, [batch, *grouped])])
    body = _step(f"{node.name}.step", start, tokens, _integers(graph, [3]))
    outputs = [(kind, start.shape), (kind, [length, batch, groups, each, 1, value_size])]
    last, found = graph.insert(node, "Scan", [start, *tokens], outputs, {"body": body, "num_scan_inputs": len(tokens)})
    perm = [1, 0, 2, 3, 4, 5]
    (turned,) = graph.insert(
        node, "Transpose", [found], [(kind, [batch, length, groups, each, 1, value_size])], {"perm": perm}
    )
    flat = _integers(graph, [0, 0, heads * value_size])
    (joined,) = graph.insert(node, "Reshape", [turned, flat], [(output.dtype, output.shape)])
    replace(output, joined)
    whole = _integers(graph, [0, heads, key_size, value_size])
    (after,) = graph.insert(node, "Reshape", [last, whole], [(present.dtype, present.shape)])
    replace(present, after)


def _step(name: str, start: ir.Value, tokens: Sequence[ir.Value], axes: ir.Value) -> ir.Graph:
    """One token: the state [B, G, H / G, K, V] after it, and what the query reads there [B, G, H / G, 1, V]."""
    nodes: list[ir.Node] = []
    kind = start.type

    def given(label: str, like: ir.Value, first: int) -> ir.Value:
        return ir.Value(name=f"{name}.{label}", type=kind, shape=ir.Shape(_shape(like)[first:]))

    def emit(op: str, *inputs: ir.Value, shape: ir.Shape | None = None) -> ir.Value:
        attributes = {"keepdims": 1} if op == "ReduceSum" else {}
        made = ir.Value(name=f"{name}.{len(nodes)}", type=kind, shape=shape)
        nodes.append(ir.node(op, list(inputs), attributes, outputs=[made], name=f"{name}.{op}.{len(nodes)}"))
        return made

    state = given("state", start, 0)
    inputs = [given(f"token{number}", token, 1) for number, token in enumerate(tokens)]
    query, key, value, decay, *beta = inputs
    decayed = emit("Mul", state, decay)
    if beta:
        known = emit("ReduceSum", emit("Mul", decayed, key), axes)
        value = emit("Mul", emit("Sub", value, known), beta[0])
    after = emit("Add", decayed, emit("Mul", key, value), shape=start.shape)
    read = emit("ReduceSum", emit("Mul", after, query), axes, shape=inputs[2].shape)
    return ir.Graph([state, *inputs], [after, read], nodes=nodes, name=name)


def _integers(graph: DecoderGraph, numbers: Sequence[int]) -> ir.Value:
    name = "recurrence." + ".".join(map(str, numbers))
    return graph.add_constant(name, np.array(numbers, np.int64))


def _shape(value: ir.Value | None) -> Dims:
    if value is None or value.shape is None:
        raise RuntimeError("a recurrent layer whose shapes are unknown")
    return list(value.shape)


def _sizes(value: ir.Value) -> list[int]:
    """The sizes of a value, 0 where they are dynamic."""
    return [size if isinstance(size, int) else 0 for size in _shape(value)]
