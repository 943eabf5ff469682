"""Rules about which operators there are, and about what single operators take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx_ir as ir

from fmedge_converters.preflight.graph import Graph, constant_of, input_of, is_constant, text, whole
from fmedge_converters.preflight.operators import CONTRIB, FIRST, INSTEAD, RTX_CONTRIB, RTX_KNOWS, RTX_LACKS
from fmedge_converters.preflight.rule import Rule
from fmedge_converters.preflight.versions import Asked

ONNX = ("", "ai.onnx")
LARGEST_K = 3840


def unknown(node: ir.Node, graph: Graph, asked: Asked) -> Iterator[str]:
    """An operator that the parser has no importer for."""
    kind, version = node.op_type, asked.version
    if (node.domain, kind) in graph.functions or node.domain not in ONNX:
        return
    if kind not in FIRST and not (version.rtx and kind in RTX_KNOWS):
        yield f"there is no {kind}; {INSTEAD.get(kind, 'replace it by operators that are there')}"
    elif FIRST.get(kind, (0, 0)) > version.number:
        first = ".".join(map(str, FIRST[kind]))
        yield f"{kind} came with TensorRT {first}; {INSTEAD.get(kind, f'use TensorRT {first} or later')}"
    elif version.rtx and kind in RTX_LACKS:
        yield f"there is no {kind}"


def foreign(node: ir.Node, graph: Graph, asked: Asked) -> Iterator[str]:
    """An operator of another domain, which only a plugin could compute."""
    if node.domain in ONNX or (node.domain, node.op_type) in graph.functions:
        return
    if asked.version.rtx and node.op_type in RTX_CONTRIB:
        return
    words = CONTRIB.get(node.op_type) or "it needs a plugin of that name; fmedge ships none"
    yield f"{node.domain}::{node.op_type} is no operator of ONNX: {words}"


def _top_k(node: ir.Node, graph: Graph, asked: Asked) -> Iterator[str]:
    del graph, asked
    count = constant_of(input_of(node, 1))
    if count is not None and not count.size:
        yield "K is empty"
    elif count is not None and int(count.reshape(-1)[0]) > LARGEST_K:
        yield f"K is {int(count.reshape(-1)[0])}, and {LARGEST_K} is the most"


def _sorted(node: ir.Node, graph: Graph, asked: Asked) -> Iterator[str]:
    del graph, asked
    if not whole(node, "sorted", 1):
        yield "sorted is 0, and the elements come sorted all the same"


def _scatter_nd(node: ir.Node, graph: Graph, asked: Asked) -> Iterator[str]:
    del graph, asked
    reduction = text(node, "reduction", "none")
    if reduction != "none":
        yield f"it cannot reduce ({reduction})"


def _loop(node: ir.Node, graph: Graph, asked: Asked) -> Iterator[str]:
    del graph, asked
    carried = len(node.inputs) - 2
    if len(node.outputs) > carried and not is_constant(input_of(node, 0)):
        yield "it collects outputs of as many turns as the graph computes; the number of turns must be a constant"


def _constant(number: int, what: str) -> Rule:
    """A rule that an input must be in the file; given the input's place."""

    def look(node: ir.Node, graph: Graph, asked: Asked) -> Iterator[str]:
        del graph, asked
        value = input_of(node, number)
        if value is not None and not is_constant(value):
            yield f"{what} must be a constant, and is computed"

    return Rule(
        name="constant-input",
        operators=(),
        look=look,
        advice="fold it into the graph",
        evidence="changelog",
    )


def _cum_sum(node: ir.Node, graph: Graph, asked: Asked) -> Iterator[str]:
    del graph, asked
    value = input_of(node, 0)
    if value is not None and value.dtype is not None and not value.dtype.is_floating_point():
        yield f"it sums floats only, and gets {value.dtype.name}"


def _integer_power(node: ir.Node, graph: Graph, asked: Asked) -> Iterator[str]:
    del graph
    # Exponents first, bases four versions later.
    for number, what, since in ((1, "exponent", (10, 8)), (0, "base", (10, 12))):
        value = input_of(node, number)
        integral = value is not None and value.dtype is not None and value.dtype.is_integer()
        if integral and asked.version.number < since:
            yield f"an integer {what} came with TensorRT {since[0]}.{since[1]}"


def _group_norm(node: ir.Node, graph: Graph, asked: Asked) -> Iterator[str]:
    del asked
    if graph.model.opset_imports.get("", 0) >= 21:
        yield "the form of opset 21 came with TensorRT 10.9"


def _seeded(node: ir.Node, graph: Graph, asked: Asked) -> Iterator[str]:
    del graph, asked
    if "seed" in node.attributes:
        yield "its seed is ignored"


def _extra_outputs(node: ir.Node, graph: Graph, asked: Asked) -> Iterator[str]:
    del graph, asked
    if sum(bool(value.name) for value in node.outputs) > 1:
        yield "only its first output is computed"


def _resize(node: ir.Node, graph: Graph, asked: Asked) -> Iterator[str]:
    del graph, asked
    if text(node, "mode", "nearest") not in ("nearest", "linear", "cubic"):
        yield f"there is no mode {text(node, 'mode', '')}"


def _constant_rule(operators: tuple[str, ...], number: int, what: str, until: tuple[int, int]) -> Rule:
    made = _constant(number, what)
    return Rule(made.name, operators, made.look, made.advice, made.evidence, until=until)


SIZES: Mapping[str, tuple[int, ...]] = {
    **{"Reshape": (1,), "Expand": (1,), "Tile": (1,), "ConstantOfShape": (0,), "TopK": (1,), "OneHot": (1,)},
    **{"Range": (0, 1, 2), "Slice": (1, 2, 3, 4), "Pad": (1, 3), "Resize": (2, 3), "Split": (1,)},
}
"""Inputs that say how large something is."""


def _sizes(node: ir.Node, graph: Graph, asked: Asked) -> Iterator[str]:
    del asked
    for number in SIZES[node.op_type]:
        value = input_of(node, number)
        if value is not None and value in graph.model.graph.inputs and not value.is_initializer():
            yield f"its sizes are the input {value.name} of the graph, for which engines would need profiles of values"


OPERATOR_RULES = (
    Rule("operator", (), unknown, "See the table of dialects in docs/tensorrt.md", "parser source"),
    Rule("domain", (), foreign, "Engines run ONNX's own operators", "parser source"),
    Rule("top-k", ("TopK",), _top_k, "Ask for fewer", "ran in TensorRT-RTX 1.7.1"),
    Rule("top-k-order", ("TopK",), _sorted, "Do not rely on the order", "documentation", "note"),
    Rule(
        "scatter-reduction",
        ("ScatterND",),
        _scatter_nd,
        "Write it with ScatterElements, or without a reduction",
        "ran in TensorRT-RTX 1.7.1",
    ),
    Rule(
        "scatter-reduction",
        ("ScatterElements",),
        _scatter_nd,
        "It is a plugin of TensorRT, which TensorRT-RTX lacks",
        "ran in TensorRT-RTX 1.7.1",
        rtx=True,
    ),
    Rule("loop-outputs", ("Loop",), _loop, "Give the number of turns as a constant, or unroll it", "documentation"),
    Rule("size-input", tuple(SIZES), _sizes, "Take them from the shape of another input", "ran in TensorRT-RTX 1.7.1"),
    Rule("resize-mode", ("Resize", "Upsample"), _resize, "Use nearest, linear or cubic", "documentation"),
    Rule("cumsum-type", ("CumSum",), _cum_sum, "Cast to fp32 before and back behind", "documentation", until=(10, 8)),
    Rule("power-type", ("Pow",), _integer_power, "Cast it to a float", "changelog", until=(10, 12)),
    Rule("group-norm", ("GroupNormalization",), _group_norm, "Export for tensorrt-compat", "changelog", until=(10, 9)),
    Rule(
        "random-seed",
        ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"),
        _seeded,
        "Draw on the host and give the numbers as an input",
        "documentation",
        "wrong",
    ),
    Rule("norm-outputs", ("LayerNormalization",), _extra_outputs, "Compute the others by operators", "documentation"),
    _constant_rule(("CumSum",), 1, "the axis", (10, 8)),
    _constant_rule(("Squeeze", "Unsqueeze"), 1, "axes", (999, 0)),
    _constant_rule(("Pad",), 3, "axes", (10, 4)),
    _constant_rule(("ReduceMax", "ReduceMin", "ReduceSum", "ReduceMean", "ReduceProd"), 1, "axes", (999, 0)),
)
