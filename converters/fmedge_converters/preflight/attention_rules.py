"""Rules about attention and caches: Attention, TensorScatter, RotaryEmbedding."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from fmedge_converters.preflight.graph import Graph, dtype_of, input_of, shape_of, text, whole
from fmedge_converters.preflight.rule import Evidence, Rule
from fmedge_converters.preflight.versions import Asked
from fmedge_converters.scan_order import comes_after, dynamic_scans

LARGEST_HEAD = 256
LEAST_HEAD = 16
RANKS = (3, 4)
RAN: Evidence = "ran in TensorRT-RTX 1.7.1"


def _is_given(value: ir.Value | None) -> bool:
    return value is not None and value.name != ""


def _past(node: ir.Node, graph: Graph, asked: Asked) -> Iterator[str]:
    del graph, asked
    if _is_given(input_of(node, 4)) or _is_given(input_of(node, 5)):
        yield "it takes no past_key and past_value"
    if sum(bool(value.name) for value in node.outputs) > 1:
        yield "it has one output only"


def _lengths(node: ir.Node, graph: Graph, asked: Asked) -> Iterator[str]:
    del graph, asked
    if _is_given(input_of(node, 6)):
        yield "nonpad_kv_seqlen is ignored without a word, so padding is attended to"


def _extras(node: ir.Node, graph: Graph, asked: Asked) -> Iterator[str]:
    del graph, asked
    found = node.attributes.get("softcap")
    if found is not None and found.as_float() != 0.0:
        yield "it has no softcap"
    for name in ("softmax_precision", "qk_matmul_output_mode"):
        if name in node.attributes and whole(node, name, 0) != 0:
            yield f"it has no {name}"


def _causal(node: ir.Node, graph: Graph, asked: Asked) -> Iterator[str]:
    del graph, asked
    if not whole(node, "is_causal", 0):
        return
    lengths = [_length(node, number) for number in (0, 1)]
    if None in lengths or lengths[0] != lengths[1]:
        yield "is_causal counts from the upper left, which is wrong for new tokens behind a longer cache"


def _length(node: ir.Node, number: int) -> int | str | None:
    """The tokens of an input: a size, or the name of its axis."""
    value = input_of(node, number)
    if value is None or value.shape is None or len(value.shape) not in RANKS:
        return None
    size = value.shape[1 if len(value.shape) == 3 else 2]
    return size if isinstance(size, int) else size.value


def _kernel(node: ir.Node, graph: Graph, asked: Asked) -> Iterator[str]:
    del graph, asked
    if whole(node, "TRT_decomposable", 0):
        return
    query, value = input_of(node, 0), input_of(node, 2)
    if query is not None and query.shape is not None and len(query.shape) not in RANKS:
        yield f"its tensors have {len(query.shape)} axes, and must have 3 or 4"
    if dtype_of(query) in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
        yield "there is no kernel in fp32"
    sizes = [_head(node, query, "q_num_heads"), _head(node, value, "kv_num_heads")]
    if sizes[0] is not None and sizes[0] > LARGEST_HEAD:
        yield f"heads of {sizes[0]} are larger than {LARGEST_HEAD}, and have no kernel"
    elif sizes[0] is not None and (sizes[0] % 8 or sizes[0] < LEAST_HEAD):
        yield f"heads of {sizes[0]} have no kernel: multiples of 8 from {LEAST_HEAD} on have"
    elif None not in sizes and sizes[0] != sizes[1]:
        yield f"keys of {sizes[0]} and values of {sizes[1]} have no kernel together"


def _head(node: ir.Node, value: ir.Value | None, heads: str) -> int | None:
    """The size of a head, of tensors with and without an axis of heads."""
    shape = shape_of(value)
    if shape is None or len(shape) not in RANKS or shape[-1] is None:
        return None
    number = whole(node, heads, 0)
    return shape[-1] // number if len(shape) == 3 and number else shape[-1]


def _mask(node: ir.Node, graph: Graph, asked: Asked) -> Iterator[str]:
    del graph, asked
    mask, query = dtype_of(input_of(node, 3)), dtype_of(input_of(node, 0))
    if mask is not None and query is not None and mask not in (ir.DataType.BOOL, query):
        yield f"its mask is {mask.name}, and must be BOOL or {query.name}"


def _scatter(node: ir.Node, graph: Graph, asked: Asked) -> Iterator[str]:
    del graph, asked
    shape, kind = shape_of(input_of(node, 0)), dtype_of(input_of(node, 0))
    if text(node, "mode", "linear") != "linear":
        yield f"it has no mode {text(node, 'mode', 'linear')}"
    if kind is not None and kind not in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        yield f"caches are of floats, and this one is {kind.name}"
    if shape is None:
        return
    if len(shape) != 4:
        yield f"caches have four axes, and this one has {len(shape)}"
    elif whole(node, "axis", -2) not in (-2, 2):
        yield f"it writes along axis -2 only, and not {whole(node, 'axis', -2)}"
    elif shape[2] is None:
        yield "the capacity of a cache must be a number, and is dynamic"


def _apart(node: ir.Node, graph: Graph, asked: Asked) -> Iterator[str]:
    del asked
    source, made = input_of(node, 0), node.outputs[0]
    if source not in graph.model.graph.inputs or made not in graph.model.graph.outputs:
        yield "a cache is written where it lies, so it must be an input of the graph and go straight to an output"


def _before_scan(node: ir.Node, graph: Graph, asked: Asked) -> Iterator[str]:
    del asked
    scans = dynamic_scans(graph.nodes())
    if not comes_after(node, scans):
        yield "the builder dies where a Scan over a dynamic axis is beside or behind it"


ATTENTION_RULES = (
    Rule("attention-past", ("Attention",), _past, "Write the cache with TensorScatter before it", RAN),
    Rule("attention-lengths", ("Attention",), _lengths, "Give a mask", RAN, "wrong"),
    Rule("attention-extras", ("Attention",), _extras, "Write it in matrix products", RAN),
    Rule("attention-causal", ("Attention",), _causal, "Give a mask made of positions", RAN, "wrong"),
    Rule("attention-kernel", ("Attention",), _kernel, "Write it in matrix products, in fp16", RAN),
    Rule("attention-before-scan", ("Attention",), _before_scan, "Write it in matrix products", RAN, rtx=True),
    Rule("attention-mask", ("Attention",), _mask, "Cast it", "documentation"),
    Rule("cache-update", ("TensorScatter",), _scatter, "Export for tensorrt, or for tensorrt-compat", RAN),
    Rule("cache-in-place", ("TensorScatter",), _apart, "Export for tensorrt", "documentation", "note"),
)
