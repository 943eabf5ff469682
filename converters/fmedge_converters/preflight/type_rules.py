"""Rules about types: strongly typed networks convert nothing by themselves."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from fmedge_converters.preflight.graph import Graph, dtype_of, input_of, whole
from fmedge_converters.preflight.operators import BOOLEANS, FLOATS, HALVES, NUMBERS, RTX_REFUSES, RTX_TAKES
from fmedge_converters.preflight.rule import Rule
from fmedge_converters.preflight.versions import Asked, Number

SAME = (
    *("Add", "Sub", "Mul", "Div", "Mod", "Min", "Max", "Mean", "Sum", "MatMul", "Gemm", "Concat", "Conv"),
    *("ConvTranspose", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "PRelu", "LayerNormalization"),
    *("GroupNormalization", "InstanceNormalization"),
)
"""Operators whose inputs must be of one type."""
CHOICES = ("Where",)
"""Of which only the later inputs must."""
NEVER = frozenset({ir.DataType.STRING, ir.DataType.COMPLEX64, ir.DataType.COMPLEX128, ir.DataType.UNDEFINED})
NARROW = frozenset(
    {ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64, ir.DataType.INT16, ir.DataType.UINT4}
    | {kind for kind in (getattr(ir.DataType, "INT2", None), getattr(ir.DataType, "UINT2", None)) if kind is not None}
)
QUANTIZED = frozenset({ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2, ir.DataType.FLOAT4E2M1})
HARDWARE: tuple[tuple[ir.DataType, Number, str], ...] = (
    (ir.DataType.BFLOAT16, (8, 0), "Ampere"),
    (ir.DataType.FLOAT8E4M3FN, (8, 9), "Ada"),
    (ir.DataType.FLOAT4E2M1, (10, 0), "Blackwell"),
)
"""Types that need tensor cores of a generation: type, compute capability, its name."""


def mixed(node: ir.Node, graph: Graph, asked: Asked) -> Iterator[str]:
    """Inputs of several types."""
    del graph, asked
    inputs = node.inputs[1:] if node.op_type in CHOICES else node.inputs
    kinds = {kind.name for kind in map(dtype_of, inputs) if kind is not None}
    if len(kinds) > 1:
        yield f"its inputs are {' and '.join(sorted(kinds))}, and must have one type"


def unsupported(node: ir.Node, graph: Graph, asked: Asked) -> Iterator[str]:
    """Types that TensorRT does not have; those of codes have a rule of their own."""
    del graph, asked
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        return
    kinds = {value.dtype for value in (*node.inputs, *node.outputs) if value is not None and value.dtype is not None}
    for kind in sorted(kinds & (NEVER | NARROW), key=lambda kind: kind.name):
        yield f"there is no type {kind.name}"


def operands(node: ir.Node, graph: Graph, asked: Asked) -> Iterator[str]:
    """Types that an operator does not compute with."""
    del graph
    kind = dtype_of(input_of(node, 0))
    if kind is not None and asked.version.rtx and _taken_all_the_same(node, kind):
        return
    if kind is not None and asked.version.rtx and node.op_type in RTX_REFUSES.get(kind.name, ()):
        yield f"TensorRT-RTX does not compute it with {kind.name}"
        return
    if kind is None or (kind is ir.DataType.DOUBLE and node.op_type not in BOOLEANS):
        return  # doubles are taken for floats
    if node.op_type in FLOATS:
        fits, wanted = kind.is_floating_point(), "floats"
    elif node.op_type in HALVES:
        fits, wanted = kind in (ir.DataType.FLOAT, ir.DataType.FLOAT16), "fp32 and fp16"
    elif node.op_type in BOOLEANS:
        fits, wanted = kind is ir.DataType.BOOL, "booleans"
    elif node.op_type in NUMBERS:
        fits, wanted = kind is not ir.DataType.BOOL, "numbers"
    else:
        return
    if not fits:
        yield f"it computes with {wanted}, and gets {kind.name}"


def _taken_all_the_same(node: ir.Node, kind: ir.DataType) -> bool:
    return node.op_type in RTX_TAKES.get(kind.name, ())


def undocumented(node: ir.Node, graph: Graph, asked: Asked) -> Iterator[str]:
    """Types that TensorRT-RTX takes, and no document promises."""
    del graph, asked
    kind = dtype_of(input_of(node, 0))
    if kind is not None and _taken_all_the_same(node, kind):
        yield f"TensorRT-RTX builds it for {kind.name}, which TensorRT does not"


def remainders(node: ir.Node, graph: Graph, asked: Asked) -> Iterator[str]:
    """Integers that are of 32 or 64 bits; and remainders of floats, which C's fmod computes."""
    del graph, asked
    kind = dtype_of(input_of(node, 0))
    if kind is not None and kind.is_integer() and kind not in (ir.DataType.INT32, ir.DataType.INT64):
        yield f"it computes with INT32 and INT64, and gets {kind.name}"
    elif kind is not None and kind.is_floating_point() and node.op_type == "Mod" and not whole(node, "fmod", 0):
        yield f"without fmod it computes with INT32 and INT64, and gets {kind.name}"


def casts(node: ir.Node, graph: Graph, asked: Asked) -> Iterator[str]:
    """Casts to types that only quantization makes."""
    del asked
    made = node.outputs[0]
    if made.dtype in QUANTIZED:
        yield f"{made.dtype.name} comes of QuantizeLinear only"
    elif made.dtype is ir.DataType.UINT8 and made not in graph.model.graph.outputs:
        yield "UINT8 is for inputs and outputs of the graph only"


def batch_norm(node: ir.Node, graph: Graph, asked: Asked) -> Iterator[str]:
    """Statistics of another type than the input."""
    yield from mixed(node, graph, asked)


def bytes_inside(node: ir.Node, graph: Graph, asked: Asked) -> Iterator[str]:
    """Bytes are for inputs and outputs of the network, and for casts of them."""
    del graph, asked
    others = ("Cast", "CastLike", "QuantizeLinear", "DequantizeLinear", "Identity", "Constant", "Shape", "Size")
    if node.op_type not in others and any(dtype_of(value) is ir.DataType.UINT8 for value in node.inputs):
        yield "UINT8 is for inputs and outputs of the graph only"


def doubles(node: ir.Node, graph: Graph, asked: Asked) -> Iterator[str]:
    """Doubles become floats."""
    del graph, asked
    if any(dtype_of(value) is ir.DataType.DOUBLE for value in (*node.inputs, *node.outputs)):
        yield "doubles are computed in fp32"


def hardware(node: ir.Node, graph: Graph, asked: Asked) -> Iterator[str]:
    """Types that the tensor cores of the device do not have."""
    del graph
    if asked.capability is None:
        return
    kinds = {value.dtype for value in (*node.inputs, *node.outputs) if value is not None}
    for kind, least, generation in HARDWARE:
        if kind in kinds and asked.capability < least:
            have = ".".join(map(str, asked.capability))
            yield f"{kind.name} needs {generation} ({least[0]}.{least[1]}), and {asked.name} has {have}"


def old_types(node: ir.Node, graph: Graph, asked: Asked) -> Iterator[str]:
    """Types that came later."""
    del graph
    kinds = {value.dtype for value in (*node.inputs, *node.outputs) if value is not None}
    for kind, since in ((ir.DataType.FLOAT4E2M1, (10, 8)), (getattr(ir.DataType, "FLOAT8E8M0", None), (10, 12))):
        if kind in kinds and kind is not None and asked.version.number < since:
            yield f"{kind.name} came with TensorRT {since[0]}.{since[1]}"


TYPE_RULES = (
    Rule("one-type", (*SAME, *CHOICES), mixed, "Cast one of them", "ran in TensorRT-RTX 1.7.1"),
    Rule("types", (), unsupported, "Cast to a type that there is", "ran in TensorRT-RTX 1.7.1"),
    Rule("operands", (), operands, "Cast it before, and back behind", "ran in TensorRT-RTX 1.7.1"),
    Rule("undocumented-type", (), undocumented, "Cast it for TensorRT", "ran in TensorRT-RTX 1.7.1", "note", rtx=True),
    Rule("operands", ("Mod", "Pow"), remainders, "Cast it before, and back behind", "ran in TensorRT-RTX 1.7.1"),
    Rule("cast", ("Cast", "CastLike"), casts, "Leave it out", "ran in TensorRT-RTX 1.7.1"),
    Rule("batch-norm", ("BatchNormalization",), batch_norm, "Cast one of them", "changelog", until=(10, 7)),
    Rule("uint8", (), bytes_inside, "Cast the input first", "documentation"),
    Rule("double", (), doubles, "Export in fp32 or fp16", "documentation", "note"),
    Rule("new-types", (), old_types, "Quantize to int8 or int4", "changelog"),
    Rule("hardware-types", (), hardware, "Export in fp16, int8 or int4", "documentation"),
)
