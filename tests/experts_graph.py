"""One layer's experts as a graph of their own: traced like a decoder, spelled by a scheme, run by ONNX Runtime."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from fmedge_converters.decoder import quiet_libraries
from fmedge_converters.experts import IMPLEMENTATION
from fmedge_converters.graph import DecoderGraph
from fmedge_converters.passes.constant_folding import fold_constants
from fmedge_converters.passes.linear import recognise_linears
from fmedge_converters.quantize import quantize
from fmedge_converters.schemes.scheme import Scheme
from fmedge_converters.weight import weight_from_array
from fmedge_converters.writer import write_graph
from transformers import PretrainedConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

HIDDEN, INNER, EXPERTS, CHOSEN = 64, 96, 6, 2
KINDS: dict[str, Callable[[PretrainedConfig], torch.nn.Module]] = {
    "silu": MixtralExperts,
    "clamped": GptOssExperts,  # alpha, limit, biases, interleaved and transposed weights
    "limited": MiniMaxM3VLExperts,  # alpha, beta and limit over concatenated halves
    "gelu": Gemma4TextExperts,  # an activation that no kernel of the CPU has
    "relu2": NemotronHExperts,  # not gated, and an activation that no kernel of the CPU has
    "normed": MuseSparkExperts,  # a norm behind the experts
}


def config(chosen: int = CHOSEN) -> PretrainedConfig:
    """What the experts classes ask of a configuration, by all its names."""
    made = PretrainedConfig()
    settings: dict[str, Any] = {
        **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), EXPERTS),
        **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), INNER),
        **dict.fromkeys(("hidden_size", "moe_hidden_size"), HIDDEN),
        "hidden_act": "silu", "hidden_activation": "gelu_pytorch_tanh", "mlp_hidden_act": "relu2",
        "num_experts_per_tok": chosen, "moe_latent_size": None, "post_norm_eps": 1e-6,
        "swiglu_alpha": 1.702, "swiglu_limit": 1.0,
    }  # fmt: skip
    for name, value in settings.items():
        setattr(made, name, value)
    return made


class Layer(torch.nn.Module):
    """Experts, and a head behind them: schemes treat a decoder's last product in a way of its own."""

    def __init__(self, kind: str, chosen: int, dtype: torch.dtype, signed: bool) -> None:
        super().__init__()
        self.experts = KINDS[kind](config(chosen))
        self.head = torch.nn.Linear(HIDDEN, 8, bias=False)
        self.signed = signed
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
        self.to(dtype)

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the experts' output [T, H], and the head's."""
        y = self.experts(x, index, weights if self.signed else weights.abs())
        return y, self.head(y)

    def reference(self, x: np.ndarray, index: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """What transformers' own loop over the experts computes, in fp32."""
        eager = copy.deepcopy(self.experts).float()
        eager.config._experts_implementation_internal = "eager"
        with torch.no_grad():
            return eager(*(torch.from_numpy(item) for item in (x, index, weights))).numpy()


@functools.cache
def traced(
    kind: str, chosen: int = CHOSEN, dtype: torch.dtype = torch.float32, signed: bool = False
) -> tuple[Layer, bytes, frozenset[str]]:
    """The layer, its graph, and the names of its parameters."""
    layer = Layer(kind, chosen, dtype, signed)
    layer.experts.config._experts_implementation_internal = IMPLEMENTATION
    tokens = torch.export.Dim("tokens")
    arguments = (
        torch.zeros(5, HIDDEN, dtype=dtype),
        torch.zeros(5, chosen, dtype=torch.int64),
        torch.ones(5, chosen, dtype=dtype),
    )
    with quiet_libraries(), torch.no_grad():
        program = torch.onnx.export(
            layer, arguments, dynamo=True, dynamic_shapes=({0: tokens},) * 3, opset_version=23,
            input_names=["x", "index", "weights"], output_names=["y", "logits"], optimize=False, verbose=False,
        )  # fmt: skip
    assert program is not None
    names = dict(layer.named_parameters())
    return layer, ir.to_proto(program.model).SerializeToString(), frozenset(names)


def graph(kind: str, scheme: Scheme | None, block_size: int = 0, **how: Any) -> DecoderGraph:
    """The layer's graph, up to the scheme."""
    _, content, parameters = traced(kind, **how)
    model = ir.from_proto(onnx.load_from_string(content))
    initializers = model.graph.initializers
    weights = {
        name: weight_from_array(np.array(initializers[name].const_value.numpy()))
        for name in parameters
        if name in initializers
    }
    made = DecoderGraph(model, weights)
    fold_constants(made, 0)
    recognise_linears(made, 0)
    if scheme is not None:
        quantize(made, scheme, block_size)
    return made


def session(made: DecoderGraph, folder: Path) -> onnxruntime.InferenceSession:
    """Write a graph and open it."""
    written = write_graph(made, folder, "experts", lambda *_: None)
    return onnxruntime.InferenceSession(str(written.graph), providers=["CPUExecutionProvider"])


def operators(made: DecoderGraph) -> dict[str, int]:
    """How many nodes of each operator a graph has."""
    counts: dict[str, int] = {}
    for node in made.graph:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts
