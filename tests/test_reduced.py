"""The small model of the proof: few layers, but as many as the architecture can be built with."""

from __future__ import annotations

import torch
from fmedge_converters.decoder import empty_model
from fmedge_converters.reduced import reduced_config
from tiny import tiny_config


def test_layers_that_share_weights_keep_another_of_their_kind() -> None:
    kinds = ["mamba", "hybrid", "mamba", "mamba", "hybrid", "mamba", "hybrid", "mamba"]
    small = reduced_config(tiny_config("zamba", layers_block_type=kinds, num_hidden_layers=len(kinds)))
    assert small.layer_types == ["linear_attention", "hybrid", "linear_attention", "linear_attention", "hybrid"]
    empty_model(small, torch.float32)


def test_blocks_are_layers_by_another_name() -> None:
    small = reduced_config(tiny_config("xlstm", num_hidden_layers=6, num_blocks=6))
    assert small.num_blocks == small.num_hidden_layers == 2
    assert len(empty_model(small, torch.float32).backbone.blocks) == 2
