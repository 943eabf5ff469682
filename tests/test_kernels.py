"""The kernels of recurrent layers, traced and run in pieces, their state carried, against transformers' torch forms."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from fmedge_converters.decoder import quiet_libraries
from fmedge_converters.graph import DecoderGraph, replace
from fmedge_converters.in_place import updates_in_place
from fmedge_converters.kernels import KERNELS, kernel_name, recurrent_kernels
from fmedge_converters.passes.plain_recurrence import decompose_recurrence
from fmedge_converters.plain_graph import require_plain
from fmedge_converters.targets import TARGETS
from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention
from transformers.models.mamba.modeling_mamba import mamba_selective_scan
from transformers.models.mamba2.modeling_mamba2 import causal_conv1d_fn, mamba2_chunk_scan
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

Array = npt.NDArray[np.float32]

PIECES = (1, 16, 5, 1, 2, 70)
"""Tokens of each call: shorter and longer than a convolution, and longer than a chunk of torch's forms."""
BATCH = 2
TOLERANCE = 2e-5


@dataclass
class Carried:
    """The states of one layer, as a trace's cache would hold them."""

    columns: torch.Tensor | None = None
    new: torch.Tensor | None = None
    state: torch.Tensor | None = None
    kept: torch.Tensor | None = None

    def split(self, joined: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        if self.columns is None or self.new is None:
            return None
        assert self.columns.shape[-1] == columns
        return self.columns, self.new

    def keep(self, joined: torch.Tensor, columns: torch.Tensor) -> None:
        self.kept = columns

    def recurrent(self, axes: int) -> torch.Tensor | None:
        assert self.state is None or self.state.dim() == axes
        return self.state


class Layer(torch.nn.Module):
    """A layer that is one call of a kernel. forward(state, *tokens) gives the output and the next state; the same
    module computes with transformers' function outside `recurrent_kernels`, and with ours inside."""

    token_axis = 1

    def __init__(self) -> None:
        super().__init__()
        self.carried = Carried()
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def tokens(self, count: int) -> tuple[torch.Tensor, ...]:
        raise NotImplementedError

    def first_state(self) -> torch.Tensor:
        raise NotImplementedError


class GatedDelta(Layer):
    def tokens(self, count: int) -> tuple[torch.Tensor, ...]:
        heads = (BATCH, count, 2, 16)
        return (
            self.normal(*heads),
            self.normal(*heads),
            self.normal(BATCH, count, 6, 8),
            -self.normal(BATCH, count, 6).abs(),
            self.normal(BATCH, count, 6).sigmoid(),
        )

    def first_state(self) -> torch.Tensor:
        return self.normal(BATCH, 6, 16, 8)

    def forward(self, state: torch.Tensor, *tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        query, key, value, decay, beta = tokens
        return torch_chunk_gated_delta_rule(
            query, key, value, g=decay, beta=beta,
            initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True,
        )  # fmt: skip


class KimiDelta(Layer):
    def tokens(self, count: int) -> tuple[torch.Tensor, ...]:
        heads = (BATCH, count, 3, 16)
        return (
            self.normal(*heads),
            self.normal(*heads),
            self.normal(*heads),
            -self.normal(*heads).abs(),
            self.normal(BATCH, count, 3).sigmoid(),
        )

    def first_state(self) -> torch.Tensor:
        return self.normal(BATCH, 3, 16, 16)

    def forward(self, state: torch.Tensor, *tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        query, key, value, decay, beta = tokens
        return chunk_kimi_delta_attention(
            query, key, value, g=decay, beta=beta,
            initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True,
        )  # fmt: skip


class StateSpace(Layer):
    """Mamba-2. Ours has the axes of the state the other way round."""

    def __init__(self, limit: tuple[float, float] = (0.0, float("inf"))) -> None:
        super().__init__()
        self.limit = limit
        self.rates = torch.nn.Parameter(-self.normal(6).exp())
        self.skip = torch.nn.Parameter(self.normal(6))
        self.bias = torch.nn.Parameter(self.normal(6))

    def tokens(self, count: int) -> tuple[torch.Tensor, ...]:
        groups = (BATCH, count, 2, 16)
        return self.normal(BATCH, count, 6, 8), self.normal(BATCH, count, 6), self.normal(*groups), self.normal(*groups)

    def first_state(self) -> torch.Tensor:
        return self.normal(BATCH, 6, 16, 8)

    def forward(self, state: torch.Tensor, *tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, steps, key, query = tokens
        ours = kernel_name(mamba2_chunk_scan) is None
        output, last = mamba2_chunk_scan(
            hidden, steps, self.rates, key, query, chunk_size=32, D=self.skip, z=None, dt_bias=self.bias,
            initial_states=state if ours else state.transpose(2, 3),
            dt_softplus=True, dt_limit=self.limit, return_final_states=True,
        )  # fmt: skip
        return output, last if ours else last.transpose(2, 3)


class SelectiveScan(Layer):
    """Mamba. transformers' form starts from zeros only."""

    token_axis = 2

    def __init__(self) -> None:
        super().__init__()
        self.rates = torch.nn.Parameter(-self.normal(12, 16).exp())
        self.skip = torch.nn.Parameter(self.normal(12))
        self.bias = torch.nn.Parameter(self.normal(12))

    def tokens(self, count: int) -> tuple[torch.Tensor, ...]:
        channels, states = (BATCH, 12, count), (BATCH, 16, count)
        return tuple(self.normal(*shape) for shape in (channels, channels, states, states, channels))

    def first_state(self) -> torch.Tensor:
        return torch.zeros(BATCH, 12, 16)

    def forward(self, state: torch.Tensor, *tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, steps, key, query, gate = tokens
        self.carried.state = state
        return mamba_selective_scan(
            hidden, steps, self.rates, key, query, D=self.skip, z=gate,
            delta_bias=self.bias, delta_softplus=True, return_last_state=True,
        )  # fmt: skip


class Convolution(Layer):
    token_axis = 2

    def __init__(self, width: int, activation: str | None, bias: bool) -> None:
        super().__init__()
        self.activation = activation
        self.weight = torch.nn.Parameter(self.normal(12, width))
        self.bias = torch.nn.Parameter(self.normal(12)) if bias else None

    def tokens(self, count: int) -> tuple[torch.Tensor, ...]:
        return (self.normal(BATCH, 12, count),)

    def first_state(self) -> torch.Tensor:
        return self.normal(BATCH, 12, self.weight.shape[1] - 1)

    def forward(self, state: torch.Tensor, *tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (new,) = tokens
        joined = torch.cat([state, new], dim=-1)
        self.carried = Carried(columns=state, new=new)
        output = causal_conv1d_fn(joined, self.weight, self.bias, activation=self.activation)
        kept = self.carried.kept
        return output[..., -new.shape[-1] :], joined[..., new.shape[-1] :] if kept is None else kept


LAYERS = {
    "gated delta rule": GatedDelta,
    "kimi delta attention": KimiDelta,
    "mamba-2": StateSpace,
    "mamba-2, limited steps": lambda: StateSpace((0.3, 0.9)),
    "mamba": SelectiveScan,
    "convolution": lambda: Convolution(4, "silu", bias=True),
    "convolution, plain": lambda: Convolution(3, None, bias=False),
}


class Relay:
    """The states of a layer, whichever it made last."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer

    def split(self, joined: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        return self.layer.carried.split(joined, columns)

    def keep(self, joined: torch.Tensor, columns: torch.Tensor) -> None:
        self.layer.carried.keep(joined, columns)

    def recurrent(self, axes: int) -> torch.Tensor | None:
        return self.layer.carried.recurrent(axes)


def trace(layer: Layer) -> ir.Model:
    """The layer as an ONNX model with dynamic batch and tokens, traced with our kernels."""
    axes = {"batch": torch.export.Dim("batch"), "tokens": torch.export.Dim("tokens")}
    examples = [tensor[:1].repeat(3, *[1] * (tensor.dim() - 1)) for tensor in (layer.first_state(), *layer.tokens(5))]
    sequences = tuple({0: axes["batch"], layer.token_axis: axes["tokens"]} for _ in examples[1:])
    with recurrent_kernels(layer, Relay(layer)), torch.no_grad(), quiet_libraries():
        program = torch.onnx.export(
            layer.eval(),
            tuple(examples),
            dynamo=True,
            dynamic_shapes=({0: axes["batch"]}, sequences),
            output_names=["output", "present"],
            verbose=False,
        )
    assert program is not None
    program.model.opset_imports["com.microsoft"] = 1
    return program.model


def run(
    session: onnxruntime.InferenceSession, layer: Layer, tokens: tuple[torch.Tensor, ...], *, in_place: bool
) -> tuple[Array, Array]:
    """All tokens in PIECES, the state carried; in place: one buffer is the input and the output of each step."""
    first, *names = [item.name for item in session.get_inputs()]
    state = layer.first_state().numpy().copy()
    outputs, start = [], 0
    for count in PIECES:
        binding = session.io_binding()
        for name, item in zip(names, tokens, strict=True):
            binding.bind_cpu_input(name, item.narrow(layer.token_axis, start, count).contiguous().numpy())
        after = state if in_place else np.empty_like(state)
        binding.bind_input(first, "cpu", 0, np.float32, state.shape, state.ctypes.data)
        binding.bind_output("present", "cpu", 0, np.float32, after.shape, after.ctypes.data)
        binding.bind_output("output")
        session.run_with_iobinding(binding)
        outputs.append(binding.get_outputs()[1].numpy())
        state = after
        start += count
    return np.concatenate(outputs, layer.token_axis), state


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("gated delta rule", "convolution") else pytest.param(name, marks=pytest.mark.medium)
        for name in LAYERS
    ],
)
def test_pieces_with_carried_state_equal_the_whole_in_transformers(name: str) -> None:
    layer = LAYERS[name]()
    model = trace(layer)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    layer.generator.manual_seed(1)
    tokens = layer.tokens(sum(PIECES))
    layer.generator.manual_seed(2)
    layer.carried = Carried()
    with torch.no_grad(), quiet_libraries():
        wanted, last = layer(layer.first_state(), *tokens)
    for in_place in (False, True):
        layer.generator.manual_seed(2)
        output, state = run(session, layer, tokens, in_place=in_place)
        np.testing.assert_allclose(output, wanted, atol=TOLERANCE, rtol=TOLERANCE)
        np.testing.assert_allclose(state, last, atol=TOLERANCE, rtol=TOLERANCE)
    past, present = model.graph.inputs[0], model.graph.outputs[1]
    assert updates_in_place(model.graph, past, present, TARGETS["cpu"].read_first)
    # The same without ONNX Runtime's own operators.
    graph = DecoderGraph(model, {})
    found = sum(node.domain != "" for node in model.graph)
    assert decompose_recurrence(graph, 0) == found
    require_plain(graph, "tensorrt")
    plain = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    layer.generator.manual_seed(2)
    output, state = run(plain, layer, tokens, in_place=False)
    np.testing.assert_allclose(output, wanted, atol=TOLERANCE, rtol=TOLERANCE)
    np.testing.assert_allclose(state, last, atol=TOLERANCE, rtol=TOLERANCE)


def test_an_output_keeps_its_name_whatever_takes_its_place() -> None:
    past = ir.val("past", ir.DataType.FLOAT, (2,))
    nodes = [ir.node("Abs", [past]), ir.node("Neg", [past])]
    outputs = [node.outputs[0] for node in nodes]
    outputs[0].name, outputs[1].name = "present", "output"
    graph = DecoderGraph(ir.Model(ir.Graph([past], outputs, nodes=nodes, opset_imports={"": 21}), ir_version=10), {})
    replace(outputs[0], past)
    graph.remove_unused()
    assert [value.name for value in graph.graph.outputs] == ["present", "output"]
    assert [node.op_type for node in graph.graph] == ["Identity", "Neg"] and past.name == "past"
    (other,) = graph.insert(nodes[1], "Exp", [past], [(past.dtype, past.shape)])
    replace(graph.graph.outputs[1], other)
    assert [value.name for value in graph.graph.outputs] == ["present", "output"]


def test_a_plain_convolution_without_a_state_starts_from_zeros() -> None:
    shapes = {"x": (2, 6, 5), "w": (6, 1, 4), "y": (2, 6, 5), "present": (2, 6, 3)}
    x, weight, *outputs = (ir.val(name, ir.DataType.FLOAT, shape) for name, shape in shapes.items())
    node = ir.node("CausalConvWithState", [x, weight, None, None], domain="com.microsoft", outputs=outputs)
    opsets = {"": 21, "com.microsoft": 1}
    model = ir.Model(ir.Graph([x, weight], outputs, nodes=[node], opset_imports=opsets, name="g"), ir_version=10)
    random = np.random.default_rng(0)
    feeds = {name: random.standard_normal(shapes[name], np.float32) for name in ("x", "w")}
    wanted = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString()).run(None, feeds)
    assert decompose_recurrence(DecoderGraph(model, {}), 0) == 1
    found = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString()).run(None, feeds)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


STATE = ir.Shape((2, 4))
READERS = {
    # (operator, inputs) of each node in turn; the last one writes the new state
    "read before it is written": ([("Neg", ["past"]), ("Mul", ["0", "x"])], True),
    "read by what does not come before": ([("Add", ["past", "x"]), ("Mul", ["x", "x"])], False),
    "read through a view": ([("Identity", ["past"]), ("Add", ["0", "x"]), ("Mul", ["x", "x"])], False),
    "read by the writer": ([("Mul", ["past", "x"])], False),
    "read first by the writer": ([("LinearAttention", ["past", "x"])], True),
    "read by another operator, too": ([("Neg", ["past"]), ("LinearAttention", ["past", "x"])], False),
}


@pytest.mark.parametrize("name", READERS)
def test_a_state_is_updated_in_place_only_if_it_has_been_read(name: str) -> None:
    nodes, in_place = READERS[name]
    values = {
        given: ir.Value(name=given, type=ir.TensorType(ir.DataType.FLOAT), shape=STATE) for given in ("past", "x")
    }
    made = []
    for number, (op, inputs) in enumerate(nodes):
        node = ir.node(op, [values[given] for given in inputs], domain="com.microsoft" if len(op) > 12 else "")
        values[str(number)] = node.outputs[0]
        made.append(node)
    graph = ir.Graph([values["past"], values["x"]], [made[-1].outputs[0]], nodes=made, opset_imports={"": 23})
    read_first = frozenset(("LinearAttention",))
    assert updates_in_place(graph, values["past"], made[-1].outputs[0], read_first) is in_place


def test_functions_are_put_back() -> None:
    before = causal_conv1d_fn
    layer = Convolution(4, None, bias=False)
    with recurrent_kernels(layer, Relay(layer)):
        assert causal_conv1d_fn is not before
    assert causal_conv1d_fn is before and kernel_name(before) == "causal_conv1d_fn"


def test_every_kernel_that_transformers_names_is_known() -> None:
    import transformers

    one_token = {"causal_conv1d_update", "fused_recurrent_gated_delta_rule", "fused_recurrent_kda"}
    one_token.add("selective_state_update")
    training = {"mamba_inner_fn", "mamba_split_conv1d_scan_combined"}
    folder = Path(transformers.__file__).parent / "models"
    sources = (file.read_text("utf-8") for file in folder.glob("*/modeling_*.py"))
    named = {name for text in sources for name in re.findall(r"_from_hub_with_fallback\(\s*\"(\w+)\"", text)}
    assert named - one_token - training == set(KERNELS)
