"""Small graphs, each about one thing that TensorRT takes or refuses, by the rule that is about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

F16, F32, I64, BOOL = TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


@dataclass(frozen=True)
class Case:
    """A graph, and what is expected of it."""

    name: str
    rule: str | None
    """The rule that must find something; None: no rule may."""
    make: Callable[[], onnx.ModelProto]
    effect: str = "fails"
    rtx_takes: bool | None = None
    """What TensorRT-RTX does, where that is not what the rule says."""

    def save(self, folder: Path) -> Path:
        """The graph as a file."""
        path = folder / f"{self.name}.onnx"
        onnx.save(self.make(), path)
        return path


def tensor(name: str, kind: int, *shape: Any) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def array(name: str, value: Any, kind: int | None = None) -> onnx.TensorProto:
    if kind in (TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2):
        value = np.asarray(value)
        return helper.make_tensor(name, kind, value.shape, value.reshape(-1).tolist())
    return numpy_helper.from_array(np.asarray(value), name)


def model(nodes: list[Any], inputs: list[Any], outputs: list[Any], constants: list[Any] = (), opset: int = 24) -> Any:
    for number, node in enumerate(nodes):
        node.name = node.name or f"node{number}"
    graph = helper.make_graph(nodes, "small", inputs, outputs, list(constants))
    opsets = [helper.make_opsetid("", opset)]
    if any(node.domain for node in nodes):
        opsets.append(helper.make_opsetid("com.microsoft", 1))
    made = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    return onnx.shape_inference.infer_shapes(made)


def unary(operator: str, kind: int = F32, opset: int = 22, **attributes: Any) -> Callable[[], Any]:
    def make() -> Any:
        node = helper.make_node(operator, ["x"], ["y"], **attributes)
        return model([node], [tensor("x", kind, 2, 8)], [tensor("y", kind, 2, 8)], opset=opset)

    return make


def binary(operator: str, first: int, second: int, result: int, **attributes: Any) -> Callable[[], Any]:
    def make() -> Any:
        node = helper.make_node(operator, ["x", "z"], ["y"], **attributes)
        return model([node], [tensor("x", first, 8, 8), tensor("z", second, 8, 8)], [tensor("y", result, 8, 8)])

    return make


def attention(
    kind: int = F16,
    head: int = 64,
    tokens: tuple[int, int] = (4, 16),
    mask: int | None = BOOL,
    extra: tuple[str, ...] = (),
    past: bool = False,
    **attributes: Any,
) -> Callable[[], Any]:
    def make() -> Any:
        inputs = [tensor("q", kind, 1, 4, tokens[0], head)]
        inputs += [tensor(name, kind, 1, 2, tokens[1], head) for name in "kv"]
        names = ["q", "k", "v"]
        if mask is not None:
            inputs.append(tensor("m", mask, 1, 1, *tokens))
            names.append("m")
        if past:
            inputs += [tensor(name, kind, 1, 2, 8, head) for name in ("pk", "pv")]
            names += ["pk", "pv"]
        outputs, results = ["y"], [tensor("y", kind, 1, 4, tokens[0], head)]
        if past:
            outputs += ["nk", "nv"]
            results += [tensor(name, kind, 1, 2, 8 + tokens[1], head) for name in ("nk", "nv")]
        if "lengths" in extra:
            inputs.append(tensor("n", I64, 1))
            names = [*names, *[""] * (6 - len(names)), "n"]
        return model([helper.make_node("Attention", names, outputs, **attributes)], inputs, results)

    return make


def scan_beside_attention(tokens: int | str = "tokens") -> Any:
    """Sums over tokens, in a loop, and attention that does not ask for them."""
    state, token = tensor("state", F32, 8), tensor("token", F32, 8)
    body = helper.make_graph(
        [helper.make_node("Add", ["state", "token"], ["sum"]), helper.make_node("Identity", ["sum"], ["left"])],
        "turn",
        [state, token],
        [tensor("sum", F32, 8), tensor("left", F32, 8)],
    )
    made = attention()()
    scan = helper.make_node("Scan", ["first", "tokens"], ["last", "sums"], body=body, num_scan_inputs=1)
    made.graph.node.append(scan)
    made.graph.input.extend([tensor("first", F32, 8), tensor("tokens", F32, tokens, 8)])
    made.graph.output.extend([tensor("last", F32, 8), tensor("sums", F32, tokens, 8)])
    return made


def scatter(kind: int = F16, capacity: Any = 32, axis: int = 2, mode: str = "linear") -> Callable[[], Any]:
    def make() -> Any:
        inputs = [tensor("c", kind, 1, 2, capacity, 64), tensor("u", kind, 1, 2, 4, 64), tensor("i", I64, 1)]
        node = helper.make_node("TensorScatter", ["c", "u", "i"], ["y"], axis=axis, mode=mode)
        return model([node], inputs, [tensor("y", kind, 1, 2, capacity, 64)])

    return make


def weights(
    codes: int = TensorProto.INT4, block: int = 32, zero: int | None = None, blocks: int | None = None, size: int = 128
) -> Callable[[], Any]:
    """A product with weights [size, 64] that are dequantized in blocks along their first axis."""

    def make() -> Any:
        values = (
            np.resize(np.arange(-7, 8), (size, 64))
            if codes != TensorProto.UINT4
            else np.resize(np.arange(15), (size, 64))
        )
        if codes == TensorProto.INT8:
            values = values.astype(np.int8)
        elif codes == TensorProto.UINT8:
            values = np.abs(values).astype(np.uint8)
        count = blocks or size // block
        constants = [array("w", values, codes), array("s", np.full((count, 64), 0.1, np.float16))]
        names = ["w", "s"]
        if zero is not None:
            points = np.full((count, 64), zero)
            points = points.astype({TensorProto.INT8: np.int8, TensorProto.UINT8: np.uint8}.get(codes, np.int64))
            constants.append(array("z", points, codes))
            names.append("z")
        nodes = [
            helper.make_node("DequantizeLinear", names, ["d"], axis=0, block_size=block),
            helper.make_node("MatMul", ["x", "d"], ["y"]),
        ]
        return model(nodes, [tensor("x", F16, 4, size)], [tensor("y", F16, 4, 64)], constants, opset=21)

    return make


def quantized(zero: int, kind: int = TensorProto.INT8) -> Callable[[], Any]:
    """Activations to int8 and back."""

    def make() -> Any:
        dtype = np.int8 if kind == TensorProto.INT8 else np.uint8
        constants = [array("s", np.float32(0.1)), array("z", np.array(zero, dtype))]
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
            helper.make_node("Relu", ["d"], ["y"]),
        ]
        return model(nodes, [tensor("x", F32, 4, 64)], [tensor("y", F32, 4, 64)], constants, opset=21)

    return make


def top_k(count: int) -> Callable[[], Any]:
    def make() -> Any:
        node = helper.make_node("TopK", ["x", "k"], ["y", "i"])
        outputs = [tensor("y", F32, 1, count), tensor("i", I64, 1, count)]
        return model([node], [tensor("x", F32, 1, 8000)], outputs, [array("k", np.array([count]))])

    return make


def scatter_nd(reduction: str, operator: str = "ScatterND") -> Callable[[], Any]:
    def make() -> Any:
        indices = np.array([[0], [2]]) if operator == "ScatterND" else np.zeros((2, 8), np.int64)
        node = helper.make_node(operator, ["x", "i", "u"], ["y"], reduction=reduction)
        inputs = [tensor("x", F32, 4, 8), tensor("u", F32, 2, 8)]
        return model([node], inputs, [tensor("y", F32, 4, 8)], [array("i", indices)])

    return make


def norm(kind: int = F16, scale: int = F16, operator: str = "LayerNormalization") -> Callable[[], Any]:
    def make() -> Any:
        dtype = np.float16 if scale == F16 else np.float32
        names = ["x", "s", "b"] if operator == "LayerNormalization" else ["x", "s"]
        constants = [array(name, np.ones(64, dtype)) for name in names[1:]]
        return model(
            [helper.make_node(operator, names, ["y"])],
            [tensor("x", kind, 4, 64)],
            [tensor("y", kind, 4, 64)],
            constants,
        )

    return make


def contrib(operator: str, names: list[str], shapes: list[Any], **attributes: Any) -> Callable[[], Any]:
    def make() -> Any:
        node = helper.make_node(operator, names, ["y"], domain="com.microsoft", **attributes)
        inputs = [tensor(name, F16, *shape) for name, shape in zip(names, shapes, strict=True)]
        return model([node], inputs, [tensor("y", F16, *shapes[0])])

    return make


def cast(kind: int) -> Callable[[], Any]:
    def make() -> Any:
        nodes = [helper.make_node("Cast", ["x"], ["z"], to=kind), helper.make_node("Cast", ["z"], ["y"], to=F32)]
        return model(nodes, [tensor("x", F32, 4, 4)], [tensor("y", F32, 4, 4)])

    return make


def squeeze() -> Any:
    node = helper.make_node("Squeeze", ["x", "a"], ["y"])
    return model([node], [tensor("x", F32, 1, 8), tensor("a", I64, 1)], [tensor("y", F32, "n")])


def gathered_codes() -> Any:
    constants = [array("w", np.ones((64, 32), np.int8)), array("s", np.float16(0.1))]
    nodes = [helper.make_node("Gather", ["w", "i"], ["c"]), helper.make_node("DequantizeLinear", ["c", "s"], ["y"])]
    return model(nodes, [tensor("i", I64, 4)], [tensor("y", F16, 4, 32)], constants)


def unchecked(nodes: list[Any], opsets: Sequence[Any] = (), functions: Sequence[Any] = ()) -> Any:
    """A graph of x [2, 8] and y, whatever is wrong with it."""
    for number, node in enumerate(nodes):
        node.name = f"node{number}"
    graph = helper.make_graph(nodes, "small", [tensor("x", F32, 2, 8)], [tensor("y", F32, 2, 8)])
    opsets = [helper.make_opsetid("", 20), *opsets]
    return helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=10)


def undefined_input() -> Any:
    return unchecked([helper.make_node("Add", ["x", "nowhere"], ["y"])])


def cycle() -> Any:
    return unchecked([helper.make_node("Add", ["x", "z"], ["y"]), helper.make_node("Exp", ["y"], ["z"])])


def function_body() -> Any:
    inner = helper.make_node("Det", ["a"], ["b"], name="inner")
    own = helper.make_opsetid("own", 1)
    function = helper.make_function("own", "F", ["a"], ["b"], [inner], [helper.make_opsetid("", 20)])
    return unchecked([helper.make_node("F", ["x"], ["y"], domain="own")], [own], [function])


def unnamed_axis() -> Any:
    node = helper.make_node("Relu", ["x"], ["y"])
    return model([node], [tensor("x", F32, None, 8)], [tensor("y", F32, None, 8)])


def cum_sum() -> Any:
    node = helper.make_node("CumSum", ["x", "a"], ["y"])
    return model([node], [tensor("x", I64, 2, 8)], [tensor("y", I64, 2, 8)], [array("a", np.array(1))])


def where(second: int) -> Callable[[], Any]:
    def make() -> Any:
        node = helper.make_node("Where", ["c", "x", "z"], ["y"])
        inputs = [tensor("c", BOOL, 8, 8), tensor("x", F16, 8, 8), tensor("z", second, 8, 8)]
        return model([node], inputs, [tensor("y", F16, 8, 8)])

    return make


CASES = (
    Case("relu", None, unary("Relu")),
    Case("gelu", None, unary("Gelu", F16)),
    Case("swish", None, unary("Swish", F16, opset=24)),
    Case("bitwise", "operator", unary("BitwiseNot", TensorProto.INT32)),
    Case(
        "det",
        "operator",
        lambda: model([helper.make_node("Det", ["x"], ["y"])], [tensor("x", F32, 8, 8)], [tensor("y", F32)]),
    ),
    Case("same_types", None, binary("Add", F16, F16, F16)),
    Case("mixed_add", "one-type", binary("Add", F16, F32, F32)),
    Case("mixed_product", "one-type", binary("MatMul", F16, F32, F32)),
    Case("mixed_compare", "one-type", binary("Less", F16, F32, BOOL)),
    Case("mixed_where", "one-type", where(F32)),
    Case("where", None, where(F16)),
    Case("layer_norm", None, norm()),
    Case("mixed_layer_norm", "one-type", norm(scale=F32)),
    Case("rms_norm", None, norm(operator="RMSNormalization")),
    Case("attention", None, attention(scale=0.1)),
    Case("attention_float_mask", None, attention(mask=F16)),
    Case("attention_before_scan", "attention-before-scan", scan_beside_attention),
    Case("attention_beside_static_scan", None, lambda: scan_beside_attention(4)),
    Case("attention_fp32", "attention-kernel", attention(F32)),
    Case("attention_fp32_decomposed", None, attention(F32, TRT_decomposable=1)),
    Case("attention_512", "attention-kernel", attention(head=512)),
    Case("attention_256", None, attention(head=256)),
    Case("attention_past", "attention-past", attention(past=True, mask=None)),
    Case("attention_softcap", "attention-extras", attention(softcap=30.0)),
    Case("attention_lengths", "attention-lengths", attention(extra=("lengths",)), "wrong", rtx_takes=True),
    Case("attention_causal", "attention-causal", attention(mask=None, is_causal=1), "wrong", rtx_takes=True),
    Case("attention_causal_square", None, attention(mask=None, is_causal=1, tokens=(16, 16))),
    Case("scatter", None, scatter()),
    Case("scatter_minus_two", None, scatter(axis=-2)),
    Case("scatter_axis", "cache-update", scatter(axis=1)),
    Case("scatter_circular", "cache-update", scatter(mode="circular")),
    Case("scatter_int8", "cache-update", scatter(TensorProto.INT8)),
    Case("int4_16", None, weights(block=16)),
    Case("int4_32", None, weights()),
    Case("int4_128", None, weights(block=128)),
    Case("int8_blocks", None, weights(TensorProto.INT8)),
    Case("int4_zero", None, weights(zero=0)),
    Case("int4_offset", "zero-point", weights(zero=3)),
    Case("uint4", "quantized-type", weights(TensorProto.UINT4)),
    Case("uint8_weights", "quantized-type", weights(TensorProto.UINT8)),
    Case("int8_activations", None, quantized(0)),
    Case("int8_offset", "zero-point", quantized(3)),
    Case("uint8_activations", "uint8-codes", quantized(0, TensorProto.UINT8), "wrong", rtx_takes=True),
    Case("gathered_codes", "quantized-constant", gathered_codes),
    Case("reduce_l2_int", "operands", unary("ReduceL2", TensorProto.INT32, keepdims=1)),
    Case("is_nan_int", "operands", unary("IsNaN", I64)),
    Case("pow_int8", "operands", binary("Pow", TensorProto.INT8, TensorProto.INT8, TensorProto.INT8)),
    Case("mod_float", "operands", binary("Mod", F16, F16, F16)),
    Case("mod_fmod", None, binary("Mod", F16, F16, F16, fmod=1)),
    Case("attention_int", "operands", attention(TensorProto.INT32, mask=None)),
    Case("erf_int8", None, unary("Erf", TensorProto.INT8)),
    Case("undefined_input", "undefined-input", undefined_input),
    Case("cycle", "order", cycle),
    Case("no_axis", "definition", unary("Concat")),
    Case("function_body", "operator", function_body),
    Case("top_k", None, top_k(3840)),
    Case("top_k_large", "top-k", top_k(3841)),
    Case("scatter_nd", None, scatter_nd("none")),
    Case("scatter_nd_add", "scatter-reduction", scatter_nd("add")),
    Case("scatter_elements", None, scatter_nd("none", "ScatterElements")),
    Case("scatter_elements_add", "scatter-reduction", scatter_nd("add", "ScatterElements")),
    Case("cum_sum_int64", None, cum_sum),
    Case("fused_matmul", "domain", contrib("FusedMatMul", ["a", "b"], [(8, 8), (8, 8)])),
    Case("quick_gelu", "domain", contrib("QuickGelu", ["a"], [(8, 8)])),
    Case("attention_head_20", "attention-kernel", attention(head=20)),
    Case("attention_mask_of_numbers", "attention-mask", attention(mask=I64)),
    Case("softmax_int", "operands", unary("Softmax", TensorProto.INT32)),
    Case("exp_int", "operands", unary("Exp", I64)),
    Case("add_bool", "operands", binary("Add", BOOL, BOOL, BOOL)),
    Case("product_int", "operands", binary("MatMul", I64, I64, I64)),
    Case("add_int", None, binary("Add", I64, I64, I64)),
    Case("cast_uint8", "cast", cast(TensorProto.UINT8)),
    Case("cast_int16", "types", cast(TensorProto.INT16)),
    Case("cast_bf16", None, cast(TensorProto.BFLOAT16)),
    Case(
        "skip_norm", None, contrib("SkipSimplifiedLayerNormalization", ["a", "b", "s"], [(1, 4, 64), (1, 4, 64), (64,)])
    ),
    Case("squeeze_computed", "constant-input", squeeze),
    Case("unnamed_axis", "axes", unnamed_axis, rtx_takes=True),
)
