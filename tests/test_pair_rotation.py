"""Rotations of pairs become one operator, and nothing else does. One trace serves all."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from fmedge_converters.build import bind_weights
from fmedge_converters.fused_operators import ORT_OPERATORS
from fmedge_converters.graph import DecoderGraph
from fmedge_converters.module_trace import name_values, trace_module
from fmedge_converters.parts.part import Call, Input
from fmedge_converters.passes.constant_folding import fold_constants
from fmedge_converters.passes.pair_rotation import rotate_pairs
from fmedge_converters.passes.permutation import transpose_permutations
from fmedge_converters.passes.reshapes import simplify_reshapes
from fmedge_converters.weight import weight_from_array

HEADS, SIZE = 3, 8
RATES = (1.0, 0.5, 0.25, 0.1)
ROTATIONS = ("matrix", "sum")
OTHERS = ("mirror", "unlike", "learned", "permuted")


class Turned(torch.nn.Module):
    """States [B, S, N, D], turned by angles of their places [B, S], in every way."""

    def __init__(self) -> None:
        super().__init__()
        self.learned = torch.nn.Parameter(torch.tensor(RATES))

    def forward(self, states: torch.Tensor, places: torch.Tensor) -> dict[str, torch.Tensor]:
        angles = places[..., None] * torch.tensor(RATES)  # [B, S, 4]
        cos, sin = angles.cos(), angles.sin()
        learned = places[..., None] * self.learned
        # Of all rows the same, for a table without a batch.
        double = [value[0].repeat_interleave(2, -1)[None, :, None] for value in (cos, sin)]  # [1, S, 1, D]
        return {
            "matrix": product(states, cos, -sin, sin),
            "sum": summed(states, *double),
            # Not a rotation: a mirror; numbers that differ within a pair; angles that cannot be known.
            "mirror": product(states, cos, sin, sin),
            "unlike": summed(states, double[0], double[1].roll(1, -1)),
            "learned": product(states, learned.cos(), -learned.sin(), learned.sin()),
            "permuted": torch.einsum("bsnd->bdns", states),
        }


def product(states: torch.Tensor, cos: torch.Tensor, corner: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    heads = states.transpose(1, 2)  # [B, N, S, D]
    matrix = torch.stack([cos, corner, sin, cos], -1).reshape(*cos.shape, 2, 2).unsqueeze(1)
    pairs = heads.reshape(*heads.shape[:-1], -1, 1, 2)
    return (matrix[..., 0] * pairs[..., 0] + matrix[..., 1] * pairs[..., 1]).reshape(heads.shape)


def summed(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = states.reshape(*states.shape[:-1], -1, 2).unbind(-1)
    return states * cos + torch.stack([-second, first], -1).flatten(3) * sin


def traced() -> tuple[DecoderGraph, Call]:
    """The graph as a part's is before it is rewritten further."""
    inputs = (Input("states", ("batch", "sequence", HEADS, SIZE)), Input("places", ("batch", "sequence")))
    call = Call(inputs, lambda model, given: model(**given))
    found = trace_module(Turned(), call, torch.float32, "here", ORT_OPERATORS)
    weights = {name: weight_from_array(np.array(RATES, np.float32)) for name in found.parameters.values()}
    graph = bind_weights(found.model, found.parameters, weights)
    for rewrite in (fold_constants, simplify_reshapes):
        rewrite(graph, 0)
    return graph, call


def operators(graph: DecoderGraph) -> Counter[str]:
    return Counter(node.op_type for node in graph.graph)


@pytest.mark.medium
def test_rotations_become_one_operator_and_nothing_else_does() -> None:
    graph, call = traced()
    before = operators(graph)
    assert rotate_pairs(graph, 0) == len(ROTATIONS)
    assert transpose_permutations(graph, 0) == before["Einsum"] == 1
    found = operators(graph)
    assert (found["RotaryEmbedding"], found["Einsum"]) == (2, 0)
    assert before["Add"] - found["Add"] == 2
    assert (rotate_pairs(graph, 0), transpose_permutations(graph, 0)) == (0, 0)
    name_values(graph.graph, call, (*ROTATIONS, *OTHERS))
    session = onnxruntime.InferenceSession(
        ir.to_proto(graph.model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    module = Turned()
    for batch, length in ((1, 7), (3, 4)):
        random = np.random.default_rng(batch)
        feeds = {
            "states": random.standard_normal((batch, length, HEADS, SIZE)).astype(np.float32),
            "places": random.uniform(0, 50, (batch, length)).astype(np.float32),  # each row's are others
        }
        with torch.no_grad():
            wanted = module(**{name: torch.from_numpy(value) for name, value in feeds.items()})
        for name, ours in zip((*ROTATIONS, *OTHERS), session.run([*ROTATIONS, *OTHERS], feeds), strict=True):
            theirs = wanted[name].numpy()
            assert ours.shape == theirs.shape
            assert np.abs(ours - theirs).max() < 2e-6 * np.abs(theirs).max(), name
