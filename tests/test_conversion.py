"""Every parameter and buffer that fmedge reads from a checkpoint against the model that saved it, bit for bit.

`save_pretrained` writes files in the layout of the hub: experts one by one, fused projections fused.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fmedge_converters import conversion
from fmedge_converters.checkpoint import Checkpoint, Files
from fmedge_converters.decoder import empty_model, quiet_libraries
from fmedge_converters.export import export
from fmedge_converters.export_options import ExportOptions
from fmedge_converters.lazy_tensor import LazyTensor, NotLazyError
from fmedge_converters.weight import Weight, weight_from_array
from fmedge_runtimes.errors import SourceError
from fmedge_runtimes.load import load
from fmedge_runtimes.sampling import Sampling
from hypothesis import given, settings
from hypothesis import strategies as st
from models import greedy, make_model
from safetensors.torch import load_file, save_file
from tiny import tiny_config
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    Conv3dToLinear,
    ErnieFuseAndSplitTextVisionExperts,
    Interleave,
    MergeModulelist,
    PermuteForRope,
    SplitModulelist,
    Transpose,
    WeightConverter,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FP32 = np.dtype(np.float32)
FEW = ("mixtral", "qwen3_moe", "deepseek_v3", "hrm_text", "gpt_oss", "gpt2")
"""Stacked experts, stored buffers, a cut projection, tensors that are renamed only."""


def random_model(model_type: str) -> PreTrainedModel:
    """A tiny model; its buffers too are random."""
    config = tiny_config(model_type)
    with quiet_libraries():
        model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    stored = model.state_dict()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point() and name in stored:
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return model


def compare(model_type: str) -> None:
    model = random_model(model_type)
    with tempfile.TemporaryDirectory() as name:
        with quiet_libraries():
            model.save_pretrained(name)
        with Checkpoint(Files(Path(name)), FP32) as checkpoint:
            empty = empty_model(model.config, torch.float32)
            weights, buffers = checkpoint.weights(empty), checkpoint.buffers(empty)
            for parameter, value in model.named_parameters(remove_duplicate=False):
                assert np.array_equal(weights[parameter].array(), value.detach().numpy()), parameter
    stored = {name for name in model.state_dict() if name not in weights}
    assert set(buffers) == stored
    for buffer in stored:
        assert torch.equal(buffers[buffer], model.get_buffer(buffer)), buffer


@pytest.mark.parametrize("model_type", FEW)
def test_weights_and_buffers_are_those_of_the_model(model_type: str) -> None:
    compare(model_type)


def converting() -> list[str]:
    """The model types whose checkpoints hold other tensors than the model."""
    found = []
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            model = empty_model(tiny_config(model_type), torch.float32)
        except Exception:
            continue
        with quiet_libraries():
            if any(isinstance(item, WeightConverter) for item in get_model_conversion_mapping(model)):
                found.append(model_type)
    return found
