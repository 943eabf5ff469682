"""A graph that is made of copies of a few layers is the one that tracing every layer gives."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from fmedge_converters import repeated_layers
from fmedge_converters.build import bind
from fmedge_converters.decoder import TracedDecoder, trace_decoder
from fmedge_converters.graph import DecoderGraph
from fmedge_converters.repeated_layers import trace_by_layers
from fmedge_converters.targets import TARGETS
from fmedge_converters.weight import Weight
from models import SIZES
from transformers import AutoConfig

CONTEXT = 64
TARGET = TARGETS["cpu"]

FAST: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 6},
    # A full layer after every two with a window, a whole cache among those with windows, two rotary embeddings.
    "gemma3_text": {
        "num_hidden_layers": 8,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2 + ["sliding_attention"] * 2,
    },
    "lfm2": {"num_hidden_layers": 8, "layer_types": (["conv"] * 2 + ["full_attention"]) * 2 + ["conv"] * 2},
}
MORE: dict[str, dict[str, Any]] = {
    # Told apart by the number of the layer: the first two are dense, the others mixtures.
    "deepseek_v3": {
        "num_hidden_layers": 8,
        "first_k_dense_replace": 2,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "head_dim": 8,
    },
    "qwen2": {"num_hidden_layers": 6},  # biases
    "mixtral": {"num_hidden_layers": 6, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "smollm3": {"num_hidden_layers": 8, "pad_token_id": 0},  # no rotation in every fourth layer
    "gpt_neo": {"num_hidden_layers": 8, "attention_types": [[["global", "local"], 4]], "window_size": 16},
    "phi": {"num_hidden_layers": 6},  # attention and MLP side by side
}


def make_config(model_type: str, changes: dict[str, Any]) -> Any:
    return AutoConfig.for_model(model_type, **{**SIZES, **changes})


def rewritten(traced: TracedDecoder) -> DecoderGraph:
    """The graph after all passes, with a weight for each parameter that is a function of its name."""

    def weight(name: str, shape: tuple[int, ...]) -> Weight:
        array = np.random.default_rng(list(name.encode())).standard_normal(shape).astype(np.float32)
        return Weight(shape, array.dtype, lambda start, stop: np.ascontiguousarray(array[start:stop]))

    named = traced.module.named_parameters(remove_duplicate=False)
    graph = bind(traced, {name: weight(name, tuple(value.shape)) for name, value in named})
    for rewrite in TARGET.passes:
        rewrite(graph, CONTEXT)
    return graph


def content(value: ir.Value) -> bytes | None:
    return None if value.const_value is None else value.const_value.tobytes()


def attributes(node: ir.Node) -> dict[str, Any]:
    """Tensors by their content; the trace gives them names."""
    return {
        name: item.value.tobytes() if isinstance(item.value, ir.TensorProtocol) else str(item)
        for name, item in node.attributes.items()
    }


def same(found: ir.Graph, wanted: ir.Graph, weights: Container[str]) -> None:
    """Node for node: operators, attributes, types and shapes, and operands that correspond. `weights` are told apart
    by their names, other constants by their content; copies share those, where a trace has one for each layer."""
    for ends in ("inputs", "outputs"):
        mine, theirs = getattr(found, ends), getattr(wanted, ends)
        facts = [[(value.name, value.dtype, str(value.shape)) for value in values] for values in (mine, theirs)]
        assert facts[0] == facts[1]
    twins = dict(zip(found.inputs, wanted.inputs, strict=True))

    def constant(value: ir.Value) -> bool:
        node = value.producer()
        return node is not None and node.op_type == "Constant"

    def check(value: ir.Value | None, twin: ir.Value | None, dimensions_only: bool) -> None:
        if value is None or twin is None:
            assert value is twin
        elif constant(value):
            assert constant(twin)
            assert attributes(value.producer()) == attributes(twin.producer())
        elif value.is_initializer() and (value not in twins or value.name not in weights):
            assert twin.is_initializer()
            assert (value.dtype, str(value.shape)) == (twin.dtype, str(twin.shape))
            if value.name in weights:
                assert value.name == twin.name
            else:
                assert content(value) == content(twin)
            twins[value] = twin
        elif not dimensions_only:
            assert twins[value] is twin

    mine, theirs = ([node for node in graph if node.op_type != "Constant"] for graph in (found, wanted))
    assert len(mine) == len(theirs)
    for node, twin in zip(mine, theirs, strict=True):
        assert (node.domain, node.op_type, node.overload) == (twin.domain, twin.op_type, twin.overload)
        assert {name: str(item) for name, item in node.attributes.items()} == {
            name: str(item) for name, item in twin.attributes.items()
        }
        for value, other in zip(node.inputs, twin.inputs, strict=True):
            check(value, other, dimensions_only=node.op_type == "Shape")
        for value, other in zip(node.outputs, twin.outputs, strict=True):
            assert (value.dtype, str(value.shape)) == (other.dtype, str(other.shape))
            twins[value] = other
    for value, other in zip(found.outputs, wanted.outputs, strict=True):
        assert twins[value] is other


def check(model_type: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(model_type, changes)
    wanted = trace_decoder(config, TARGET.dialect, torch.float32, CONTEXT)
    monkeypatch.setattr(repeated_layers, "trace_decoder", short_only(config.num_hidden_layers))
    found = trace_by_layers(config, TARGET.dialect, torch.float32, CONTEXT)
    assert dict(found.parameters) == dict(wanted.parameters)
    assert (found.caches, found.states) == (wanted.caches, wanted.states)
    same(found.model.graph, wanted.model.graph, wanted.parameters)
    ours, theirs = rewritten(found), rewritten(wanted)
    assert ours.weights.keys() == theirs.weights.keys()
    same(ours.graph, theirs.graph, theirs.weights)


def short_only(layers: int) -> Any:
    """trace_decoder, which must not be asked for the whole model."""

    def trace(config: Any, *arguments: Any) -> TracedDecoder:
        assert config.num_hidden_layers < layers
        return trace_decoder(config, *arguments)

    return trace


@pytest.mark.medium
@pytest.mark.parametrize("model_type", FAST)
def test_copied_layers_are_traced_layers(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(model_type, FAST[model_type], monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MORE)
def test_copied_layers_are_traced_layers_more(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(model_type, MORE[model_type], monkeypatch)
