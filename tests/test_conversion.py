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
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    Conv3dToLinear,
    ConversionOps,
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


NEEDED: dict[str, dict[str, Any]] = {
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "qwen4_exp_text": {"indexer_budget": 16, "indexer_compress_ratio": 4},
}
"""Sizes without which a type cannot be built."""
LARGEST = 10_000_000
"""Parameters of a model that is compared; what stays larger although it is asked to be tiny is left out."""


def small(model_type: str) -> PretrainedConfig:
    return tiny_config(model_type, **NEEDED.get(model_type, {}))


def random_model(model_type: str) -> PreTrainedModel:
    """A tiny model; its buffers too are random."""
    with quiet_libraries():
        model = AutoModelForCausalLM.from_config(small(model_type)).eval()
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
            empty = empty_model(small(model_type), torch.float32)
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


def types(*, converting: bool) -> list[str]:
    """The model types that can be tiny, and whose checkpoints must be converted, or need not."""
    found = []
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            model = empty_model(small(model_type), torch.float32)
        except Exception:
            continue
        with quiet_libraries():
            converts = any(isinstance(item, WeightConverter) for item in get_model_conversion_mapping(model))
        if converts == converting and sum(value.numel() for value in model.parameters()) <= LARGEST:
            found.append(model_type)
    return found


@pytest.mark.medium
def test_every_type_whose_checkpoint_must_be_converted() -> None:
    found = types(converting=True)
    assert len(found) >= 43
    for model_type in found:
        compare(model_type)


@pytest.mark.slow
def test_every_type_whose_checkpoint_has_the_tensors_of_the_model() -> None:
    found = types(converting=False)
    assert len(found) >= 105
    for model_type in found:
        compare(model_type)


def lazily(operation: ConversionOps, sources: dict[str, list[np.ndarray]], targets: list[str], **others: Any) -> None:
    """An operation of transformers on lazy tensors and on tensors: the same results, and nothing read before."""
    reads: list[int] = []

    def watched(array: np.ndarray) -> Weight:
        whole = weight_from_array(array)

        def read(start: int, stop: int) -> np.ndarray:
            reads.append(stop - start)
            return whole.read(start, stop)

        return Weight(whole.shape, whole.dtype, read)

    def run(make: Callable[[np.ndarray], torch.Tensor]) -> dict[str, Any]:
        given = {name: [make(array) for array in arrays] for name, arrays in sources.items()}
        return operation.convert(given, source_patterns=list(sources), target_patterns=targets, **others)

    lazy = run(lambda array: LazyTensor(watched(array)))
    assert not reads
    eager = run(torch.from_numpy)
    assert lazy.keys() == eager.keys()
    for name, wanted in eager.items():
        weight = lazy[name][0].weight if isinstance(lazy[name], list) else lazy[name].weight
        whole = wanted[0] if isinstance(wanted, list) else wanted
        assert np.array_equal(weight.array(), whole.numpy()), name
        for row in range(weight.rows):
            assert np.array_equal(weight.read(row, row + 1), whole[row : row + 1].numpy()), name


def arrays(count: int, *shape: int) -> list[np.ndarray]:
    return [np.random.default_rng(seed).standard_normal(shape).astype(np.float32) for seed in range(count)]


class _Config:
    num_attention_heads = 3


OPERATIONS: dict[str, tuple[ConversionOps, dict[str, list[np.ndarray]], list[str], dict[str, Any]]] = {
    "stack": (MergeModulelist(0), {"a": arrays(3, 4, 6)}, ["x"], {}),
    "stack-inside": (MergeModulelist(1), {"a": arrays(3, 4, 6)}, ["x"], {}),
    "unstack": (SplitModulelist(0), {"a": arrays(1, 3, 4, 6)}, ["x.*"], {}),
    "concatenate-rows": (Concatenate(0), {"a": arrays(1, 4, 6), "b": arrays(2, 3, 6)}, ["x"], {}),
    "concatenate-columns": (Concatenate(1), {"a": arrays(1, 4, 6), "b": arrays(2, 4, 2)}, ["x"], {}),
    "concatenate-last": (Concatenate(-1), {"a": arrays(2, 2, 3, 4)}, ["x"], {}),
    "chunk-rows": (Chunk(0), {"a": arrays(1, 9, 4)}, ["x", "y", "z"], {}),
    "chunk-columns": (Chunk(1), {"a": arrays(1, 2, 6, 5)}, ["x", "y"], {}),
    "transpose": (Transpose(0, 1), {"a": arrays(1, 5, 7)}, ["x"], {}),
    "transpose-inside": (Transpose(1, 2), {"a": arrays(1, 3, 5, 7)}, ["x"], {}),
    "transpose-outside": (Transpose(0, 2), {"a": arrays(1, 3, 5, 7)}, ["x"], {}),
    "interleave-rows": (Interleave(0), {"a": arrays(1, 8, 3)}, ["x"], {}),
    "interleave-back": (Interleave(1, inverse=True), {"a": arrays(1, 2, 8, 3)}, ["x"], {}),
    "rotary": (PermuteForRope(), {"a": arrays(1, 12, 5)}, ["x"], {"config": _Config()}),
    "rotary-bias": (PermuteForRope(inverse=True), {"a": arrays(1, 12)}, ["x"], {"config": _Config()}),
    "convolution": (Conv3dToLinear(2, (1, 3, 3)), {"a": arrays(1, 4, 2, 1, 3, 3)}, ["x"], {}),
    "text-and-vision": (
        ErnieFuseAndSplitTextVisionExperts(),
        {"a": arrays(4, 3, 5), "b": arrays(4, 3, 5)},
        ["x", "y"],
        {"config": _Config()},
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_of_transformers_run_on_lazy_tensors(name: str) -> None:
    lazily(*OPERATIONS[name][:3], **OPERATIONS[name][3])


def test_reading_one_expert_reads_one_expert() -> None:
    asked: list[tuple[str, int, int]] = []

    def expert(name: str) -> LazyTensor:
        def read(start: int, stop: int) -> np.ndarray:
            asked.append((name, start, stop))
            return np.zeros((stop - start, 8), np.float32)

        return LazyTensor(Weight((6, 8), FP32, read))

    gate, up = ([expert(f"{part}{number}") for number in range(64)] for part in ("gate", "up"))
    fused = torch.cat([torch.stack(gate), torch.stack(up)], dim=1).transpose(1, 2)  # [E, K, 2 * N]
    assert isinstance(fused, LazyTensor)
    assert fused.weight.read(7, 8).shape == (1, 8, 12)
    assert asked == [("gate7", 0, 6), ("up7", 0, 6)]


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_chains_of_operations_read_what_torch_computes(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    lazy: torch.Tensor = LazyTensor(weight_from_array(array))
    eager = torch.from_numpy(array)
    for _ in range(data.draw(st.integers(1, 5))):
        rank = eager.dim()
        axis = data.draw(st.integers(0, rank - 1))
        step = data.draw(st.sampled_from(["permute", "reshape", "slice", "flip", "cat", "stack", "index", "negate"]))
        if step == "permute":
            axes = data.draw(st.permutations(range(rank)))
            lazy, eager = lazy.permute(axes), eager.permute(axes)
        elif step == "reshape":
            last = data.draw(st.sampled_from([size for size in (1, 2, 3, 4) if eager.numel() % size == 0]))
            lazy, eager = lazy.reshape(-1, last), eager.reshape(-1, last)
        elif step == "slice":
            start = data.draw(st.integers(0, eager.shape[axis] - 1))
            length = data.draw(st.integers(1, eager.shape[axis] - start))
            lazy, eager = lazy.narrow(axis, start, length), eager.narrow(axis, start, length)
        elif step == "flip":
            lazy, eager = lazy.flip(axis), eager.flip(axis)
        elif step == "cat":
            lazy, eager = torch.cat([lazy, lazy], axis), torch.cat([eager, eager], axis)
        elif step == "stack" and rank < 5:
            lazy, eager = torch.stack([lazy, lazy], axis), torch.stack([eager, eager], axis)
        elif step == "index":
            chosen = torch.tensor(data.draw(st.lists(st.integers(0, eager.shape[axis] - 1), min_size=1, max_size=4)))
            lazy, eager = lazy.index_select(axis, chosen), eager.index_select(axis, chosen)
        else:
            lazy, eager = -lazy, -eager
    assert isinstance(lazy, LazyTensor)
    weight, wanted = lazy.weight, eager.numpy()
    assert weight.shape == tuple(lazy.shape) == wanted.shape
    assert np.array_equal(weight.array(), wanted)
    start = data.draw(st.integers(0, weight.rows - 1))
    stop = data.draw(st.integers(start + 1, weight.rows))
    assert np.array_equal(weight.read(start, stop), wanted[start:stop])


def test_an_operation_that_needs_all_numbers_is_refused_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class SortRows(ConversionOps):
        def convert(self, input_dict: dict[str, Any], target_patterns: list[str], **_: Any) -> dict[str, Any]:
            return {target_patterns[0]: input_dict["up_proj.weight"][0].sort().values}

    with pytest.raises(NotLazyError, match=r"aten\.sort"):
        LazyTensor(weight_from_array(np.zeros(3, np.float32))).sort()
    folder = make_model(tmp_path / "model")
    rule = WeightConverter("up_proj.weight", "up_proj.weight", [SortRows()])
    monkeypatch.setattr(conversion, "get_model_conversion_mapping", lambda _: [rule])
    with pytest.raises(
        SourceError, match=r"up_proj\.weight is made of 1 tensors by transformers' SortRows.*aten\.sort"
    ):
        read_all(folder)


def read_all(folder: Path) -> dict[str, np.ndarray]:
    from fmedge_converters.source import open_source

    source = open_source(str(folder))
    with Checkpoint(source.files, FP32) as checkpoint:
        weights = checkpoint.weights(empty_model(source.config, torch.float32))
        return {name: weight.array() for name, weight in weights.items()}


MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2}


def test_experts_that_are_missing_or_of_another_size(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "mixtral", **MIXTRAL)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, folder / "model.safetensors")
    with pytest.raises(SourceError, match=r"experts\.gate_up_proj cannot be made of 7 tensors.*do not join"):
        read_all(folder)
    save_file({**tensors, name: tensors[name][:3].contiguous()}, folder / "model.safetensors")
    with pytest.raises(SourceError, match=r"experts\.gate_up_proj cannot be made of 8 tensors.*do not join"):
        read_all(folder)
    save_file({key: value for key, value in tensors.items() if ".experts.3." not in key}, folder / "model.safetensors")
    with pytest.raises(SourceError, match=r"has shape \[3, .*config.json asks for \[4, "):
        read_all(folder)


def test_two_different_tensors_for_one_parameter(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    twin = {**tensors, name.removeprefix("model."): tensors[name].clone()}
    save_file(twin, folder / "model.safetensors")
    assert np.array_equal(read_all(folder)[name], tensors[name].numpy())
    twin[name.removeprefix("model.")][0, 0] += 1
    save_file(twin, folder / "model.safetensors")
    with pytest.raises(SourceError, match=r"are both model\.layers\.0\.mlp\.up_proj\.weight.*mixed"):
        read_all(folder)


@pytest.mark.medium
def test_stored_buffers_are_in_the_graph(tmp_path: Path) -> None:
    """The bias that chooses experts is a buffer, and decides which experts run."""
    model = random_model("glm4_moe")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.2 if parameter.dim() > 1 else 1)
    with quiet_libraries():
        model.save_pretrained(tmp_path / "model")
    bundle = export(ExportOptions(str(tmp_path / "model"), tmp_path / "bundle", verify="none")).folder
    prompt = list(range(1, 20))
    with load(bundle) as loaded:
        (found,) = loaded.generate(prompt, Sampling(max_new_tokens=16, ignore_eos=True))
    assert list(found.tokens) == greedy(tmp_path / "model", prompt, 16)
