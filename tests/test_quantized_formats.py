"""Formats of quantized checkpoints: what is read, and what MatMulNBits gets, is what the source holds, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quantized_checkpoints as made
import torch
from fmedge_converters.checkpoint import Checkpoint, Files
from fmedge_converters.formats.grouped import packed, unpacked
from fmedge_converters.weight import PackedMatrix, Weight, concatenated
from fmedge_runtimes.errors import SourceError
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def compressed(bits: int = 4, **arguments: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, **arguments}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}


def written(folder: Path, quantization: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": quantization}))
    return folder


def module(tensors: dict[str, torch.Tensor], name: str = "proj") -> dict[str, torch.Tensor]:
    return {f"{name}.{part}": tensor for part, tensor in tensors.items()}


def restored(
    packed_matrix: PackedMatrix, shape: tuple[int, int], start: int = 0, stop: int | None = None
) -> np.ndarray:
    """Weights [n, K] as MatMulNBits computes with them, in the order of the input features, in fp32."""
    rows, columns = shape
    stop = rows if stop is None else stop
    bits, block = packed_matrix.bits, packed_matrix.block_size
    codes, scales = packed_matrix.codes(start, stop), packed_matrix.scales(start, stop)
    blocks = -(-columns // block)
    assert codes.shape == (stop - start, blocks, block * bits // 8)
    assert codes.dtype == np.uint8
    assert scales.shape == (stop - start, blocks)
    singles = [(codes >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    values = np.stack(singles, -1).reshape(stop - start, blocks, block).astype(np.float32)
    if packed_matrix.zero_points is None:
        values -= 1 << (bits - 1)
    else:
        zeros = packed_matrix.zero_points(start, stop)
        assert zeros.shape == (stop - start, -(-blocks * bits // 8))
        each = np.stack([(zeros >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)], -1)
        values -= each.reshape(stop - start, -1)[:, :blocks, None]
    flat = (values * scales.astype(np.float32)[..., None]).reshape(stop - start, -1)[:, :columns]
    if packed_matrix.columns is None:
        return flat
    result = np.empty_like(flat)
    result[:, packed_matrix.columns] = flat
    return result


def check(weight: Weight, wanted: np.ndarray, part: slice = slice(0, None)) -> None:
    """The floats and the packed form of a weight are the wanted ones, to the bit."""
    start, stop, _ = part.indices(len(wanted))
    assert weight.shape == wanted.shape
    assert np.array_equal(weight.read(start, stop), wanted.astype(weight.dtype)[start:stop])
    assert weight.packed is not None
    assert np.array_equal(restored(weight.packed, wanted.shape, start, stop), wanted[start:stop])


@settings(deadline=None, max_examples=40)
@given(
    layout=st.sampled_from(["gemm", "gemv"]),
    rows=st.integers(1, 4).map(lambda count: count * 8),
    groups=st.integers(1, 5),
    size=st.sampled_from([32, 64, 128, -1]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_awq(
    layout: str,
    rows: int,
    groups: int,
    size: int,
    seed: int,
    data: st.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    columns = 160 if size == -1 else groups * size
    matrix = made.random_matrix(rows, columns, 4, size, seed=seed)
    spell = made.awq_gemm if layout == "gemm" else made.awq_gemv
    config = {**AWQ, "version": layout, "group_size": size}
    folder = written(tmp_path_factory.mktemp("awq"), config, module(spell(matrix)))
    start = data.draw(st.integers(0, rows - 1))
    with Checkpoint(Files(folder), np.dtype(np.float32)) as checkpoint:
        check(checkpoint.tensors["proj.weight"], matrix.dequantized())
        check(
            checkpoint.tensors["proj.weight"],
            matrix.dequantized(),
            slice(start, data.draw(st.integers(start + 1, rows))),
        )


@settings(deadline=None, max_examples=60)
@given(
    bits=st.sampled_from([2, 4, 8]),
    version=st.sampled_from([1, 2]),
    symmetric=st.booleans(),
    act_order=st.booleans(),
    rows=st.integers(1, 3).map(lambda count: count * 16),
    columns=st.integers(1, 12).map(lambda count: count * 32),
    size=st.sampled_from([16, 32, 48, 64, 128, 512, -1]),
    seed=st.integers(0, 99),
)
def test_gptq(
    bits: int,
    version: int,
    symmetric: bool,
    act_order: bool,
    rows: int,
    columns: int,
    size: int,
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    matrix = made.random_matrix(rows, columns, bits, size, symmetric=symmetric, act_order=act_order, seed=seed)
    kind = {1: "gptq", 2: "gptq_v2"}[version]
    config = {
        **GPTQ,
        "bits": bits,
        "group_size": size,
        "sym": symmetric,
        "desc_act": act_order,
        "checkpoint_format": kind,
    }
    folder = written(tmp_path_factory.mktemp("gptq"), config, module(made.gptq(matrix, bits, version)))
    with Checkpoint(Files(folder), np.dtype(np.float32)) as checkpoint:
        weight = checkpoint.tensors["proj.weight"]
        check(weight, matrix.dequantized())
        check(weight, matrix.dequantized(), slice(5, 13))
        assert weight.packed is not None
        assert (weight.packed.zero_points is None) == symmetric
        assert weight.packed.columns is None or act_order


@settings(deadline=None, max_examples=40)
@given(
    bits=st.sampled_from([4, 8]),
    strategy=st.sampled_from(["group", "channel"]),
    symmetric=st.booleans(),
    act_order=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    rows=st.integers(1, 21),
    columns=st.integers(1, 130),
    seed=st.integers(0, 99),
)
def test_pack_quantized(
    bits: int,
    strategy: str,
    symmetric: bool,
    act_order: bool,
    dtype: torch.dtype,
    rows: int,
    columns: int,
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    size = 32 if strategy == "group" else -1
    matrix = made.random_matrix(
        rows, columns, bits, size, symmetric=symmetric, act_order=act_order, dtype=dtype, seed=seed
    )
    config = compressed(bits, symmetric=symmetric, strategy=strategy, group_size=32 if strategy == "group" else None)
    tensors = made.pack_quantized(matrix, bits, act_order)
    if symmetric:
        tensors.pop("weight_zero_point", None)
    elif "weight_zero_point" not in tensors:
        return
    folder = written(tmp_path_factory.mktemp("packed"), config, module(tensors))
    with Checkpoint(Files(folder), np.dtype(np.float32)) as checkpoint:
        check(checkpoint.tensors["proj.weight"], matrix.dequantized())
        check(checkpoint.tensors["proj.weight"], matrix.dequantized(), slice(rows // 2, rows))


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_int_quantized(strategy: str, symmetric: bool, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    codes = torch.from_numpy(random.integers(-128, 128, (24, 96)).astype(np.int8))
    count = 24 if strategy == "channel" else 1
    scales = torch.from_numpy(random.uniform(1e-3, 2e-2, (count, 1))).to(torch.bfloat16)
    zeros = torch.zeros(24, 1) if symmetric else torch.from_numpy(random.integers(-9, 9, (24, 1)))
    tensors = {"weight": codes, "weight_scale": scales if strategy == "channel" else scales[0], "bias": torch.ones(24)}
    if not symmetric:
        tensors["weight_zero_point"] = zeros.to(torch.int8)
    config = compressed(8, strategy=strategy, group_size=None, symmetric=symmetric) | {"format": "int-quantized"}
    tensors |= {"input_scale": torch.ones(1), "input_zero_point": torch.zeros(1, dtype=torch.int8)}
    folder = written(tmp_path, config, {**module(tensors), "norm.weight": torch.ones(3)})
    wanted = (codes.double() - zeros.double()) * scales.double()
    with Checkpoint(Files(folder), np.dtype(np.float32)) as checkpoint:
        assert set(checkpoint.tensors) == {"proj.weight", "proj.bias", "norm.weight"}
        check(checkpoint.tensors["proj.weight"], wanted.float().numpy())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("strategy", ["group", "channel"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_the_compressed_tensors_package_packs_and_unpacks(
    bits: int, strategy: str, symmetric: bool, tmp_path: Path
) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    size = 32 if strategy == "group" else None
    arguments = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=size)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    generator = torch.Generator().manual_seed(0)
    count = 3 if strategy == "group" else 1
    state = {
        "weight": torch.randn(40, 96, generator=generator, dtype=torch.float32).bfloat16(),
        "weight_scale": (torch.rand(40, count, generator=generator) * 0.1 + 0.05).bfloat16(),
    }
    if not symmetric:
        state["weight_zero_point"] = torch.randint(-5, 5, (40, count), generator=generator, dtype=torch.int8)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    stored = compressor.compress(state, scheme)
    theirs = compressor.decompress(stored, scheme)["weight"]  # in bf16, the type of the scales
    exact = compressor.decompress({**stored, "weight_scale": stored["weight_scale"].float()}, scheme)["weight"]
    config = compressed(bits, symmetric=symmetric, strategy=strategy, group_size=size)
    with Checkpoint(Files(written(tmp_path, config, module(stored))), np.dtype(np.float32)) as checkpoint:
        ours = checkpoint.tensors["proj.weight"]
        check(ours, exact.numpy())
        assert torch.equal(torch.from_numpy(ours.array()).bfloat16(), theirs)


def test_mxfp4_is_what_transformers_reads(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    random = np.random.default_rng(0)
    blocks = torch.from_numpy(random.integers(0, 256, (3, 10, 2, 16)).astype(np.uint8))
    scales = torch.from_numpy(random.integers(90, 140, (3, 10, 2)).astype(np.uint8))
    tensors = {"experts.up_blocks": blocks, "experts.up_scales": scales, "norm.weight": torch.ones(4)}
    with Checkpoint(Files(written(tmp_path, {"quant_method": "mxfp4"}, tensors)), np.dtype(np.float32)) as checkpoint:
        assert set(checkpoint.tensors) == {"experts.up", "norm.weight"}
        weight = checkpoint.tensors["experts.up"]
        wanted = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        assert weight.shape == tuple(wanted.shape) == (3, 64, 10)
        assert np.array_equal(weight.array(), wanted.numpy())
        assert np.array_equal(weight.read(1, 3), wanted[1:3].numpy())


@pytest.mark.parametrize("spell", [made.awq_gemm, made.gptq])
def test_fp16_keeps_the_scales_of_the_source(spell: Any, tmp_path: Path) -> None:
    matrix = made.random_matrix(16, 128, 4, 32)
    config = AWQ if spell is made.awq_gemm else GPTQ
    with Checkpoint(Files(written(tmp_path, config, module(spell(matrix, 4)))), np.dtype(np.float16)) as checkpoint:
        weight = checkpoint.tensors["proj.weight"]
        assert weight.packed is not None
        assert weight.packed.scales(0, 16).dtype == np.float16
        assert np.array_equal(weight.packed.scales(0, 16), matrix.scales.numpy())
        exact = torch.from_numpy(matrix.codes - matrix.zeros[:, matrix.groups]).half() * matrix.scales[:, matrix.groups]
        assert np.array_equal(weight.array(), exact.numpy())


def test_scales_beyond_fp16_are_refused_for_fp16(tmp_path: Path) -> None:
    tensors = made.pack_quantized(made.random_matrix(8, 64, 4, 32, symmetric=True, dtype=torch.bfloat16), 4)
    tensors["weight_scale"][3, 1] = 1e5
    with Checkpoint(Files(written(tmp_path, compressed(), module(tensors))), np.dtype(np.float16)) as checkpoint:
        weight = checkpoint.tensors["proj.weight"]
        assert weight.packed is not None
        with pytest.raises(SourceError, match="proj has values that are not finite, or beyond the range of float16"):
            weight.packed.scales(0, 8)
        with pytest.raises(SourceError, match="beyond the range of float16"):
            weight.array()


@pytest.mark.parametrize(("columns", "size"), [(64, 48), (160, 128), (1056, 1024)])
def test_a_last_group_that_is_short(columns: int, size: int, tmp_path: Path) -> None:
    matrix = made.random_matrix(16, columns, 4, size)
    folder = written(tmp_path, {**GPTQ, "group_size": size}, module(made.gptq(matrix, 4)))
    with Checkpoint(Files(folder), np.dtype(np.float32)) as checkpoint:
        check(checkpoint.tensors["proj.weight"], matrix.dequantized())


def test_groups_that_no_block_size_divides_are_read_and_not_packed(tmp_path: Path) -> None:
    matrix = made.random_matrix(16, 80, 4, 40)
    folder = written(tmp_path, {**GPTQ, "group_size": 40}, module(made.gptq(matrix, 4)))
    with Checkpoint(Files(folder), np.dtype(np.float32)) as checkpoint:
        weight = checkpoint.tensors["proj.weight"]
        assert weight.packed is None
        assert np.array_equal(weight.array(), matrix.dequantized())


def test_groups_of_unequal_sizes_are_read_and_not_packed(tmp_path: Path) -> None:
    matrix = made.random_matrix(16, 96, 4, 32)
    matrix.groups[40:60] = 0
    with Checkpoint(Files(written(tmp_path, GPTQ, module(made.gptq(matrix, 4)))), np.dtype(np.float32)) as checkpoint:
        assert checkpoint.tensors["proj.weight"].packed is None
        assert np.array_equal(checkpoint.tensors["proj.weight"].array(), matrix.dequantized())


def test_rules_for_single_modules_are_honoured(tmp_path: Path) -> None:
    eight = made.random_matrix(16, 128, 8, 64, symmetric=True)
    four = made.random_matrix(16, 128, 4, 32, symmetric=True)
    rules = {r"+:.*\.1\..*": {"bits": 8, "group_size": 64}, r"-:.*\.2\..*": {}}
    tensors = {
        **module(made.gptq(four, 4), "layers.0.proj"),
        **module(made.gptq(eight, 8), "layers.1.proj"),
        "layers.2.proj.weight": torch.ones(16, 128),
    }
    with Checkpoint(Files(written(tmp_path, {**GPTQ, "dynamic": rules}, tensors)), np.dtype(np.float32)) as checkpoint:
        check(checkpoint.tensors["layers.0.proj.weight"], four.dequantized())
        check(checkpoint.tensors["layers.1.proj.weight"], eight.dequantized())
        assert checkpoint.tensors["layers.2.proj.weight"].packed is None

    groups = compressed()["config_groups"]
    groups["group_1"] = {"targets": ["re:.*1[.]proj"], "weights": {**groups["group_0"]["weights"], "num_bits": 8}}
    eight = made.random_matrix(16, 128, 8, 32, symmetric=True)
    tensors = {
        **module(made.pack_quantized(four, 4), "layers.0.proj"),
        **module(made.pack_quantized(eight, 8), "layers.1.proj"),
    }
    folder = written(tmp_path, {**compressed(), "config_groups": groups}, tensors)
    with Checkpoint(Files(folder), np.dtype(np.float32)) as checkpoint:
        check(checkpoint.tensors["layers.0.proj.weight"], four.dequantized())
        check(checkpoint.tensors["layers.1.proj.weight"], eight.dequantized())


def test_only_matrices_that_are_packed_alike_are_joined(tmp_path: Path) -> None:
    matrices = {
        "q": made.random_matrix(16, 128, 4, 32, act_order=True, seed=1),
        "k": made.random_matrix(8, 128, 4, 32, act_order=True, seed=1),
        "v": made.random_matrix(8, 128, 4, 32, act_order=True, seed=2),
    }
    tensors: dict[str, torch.Tensor] = {}
    for name, matrix in matrices.items():
        tensors |= module(made.gptq(matrix, 4), name)
    with Checkpoint(Files(written(tmp_path, GPTQ, tensors)), np.dtype(np.float32)) as checkpoint:
        q, k, v = (checkpoint.tensors[f"{name}.weight"] for name in "qkv")
        check(concatenated([q, k]), np.concatenate([matrices["q"].dequantized(), matrices["k"].dequantized()]))
        assert concatenated([q, v]).packed is None


@settings(deadline=None, max_examples=40)
@given(bits=st.sampled_from([2, 4, 8]), rows=st.integers(1, 4), columns=st.integers(1, 40), seed=st.integers(0, 99))
def test_codes_survive_packing(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, columns)).astype(np.uint8)
    assert packed(codes, bits).shape == (rows, -(-columns * bits // 8))
    assert np.array_equal(unpacked(packed(codes, bits), bits)[:, :columns], codes)


def gptq_module(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    tensors = module(made.gptq(made.random_matrix(16, 128, 4, 32), 4))
    tensors |= {f"proj.{name}": value for name, value in changes.items() if value is not None}
    return {name: value for name, value in tensors.items() if changes.get(name[5:], value) is not None}


REFUSED: list[tuple[dict[str, Any], dict[str, torch.Tensor], str]] = [
    ({"quant_method": "bitsandbytes"}, gptq_module(), "quantized by bitsandbytes, which fmedge does not read"),
    ({}, gptq_module(), "holds a quantizer's codes, but config.json has no"),
    (GPTQ, gptq_module(scales=None), "proj lacks its scales"),
    (GPTQ, gptq_module(qweight=None), "proj lacks its qweight"),
    (GPTQ, gptq_module(qzeros=None), "proj lacks its qzeros"),
    (GPTQ, gptq_module(scales=torch.ones(3, 16)), r"scales has shape \[3, 16\] where \[4, 16\] is expected"),
    ({**GPTQ, "group_size": 64}, gptq_module(), r"scales has shape \[4, 16\] where \[2, 16\] is expected"),
    ({**GPTQ, "group_size": 0}, gptq_module(), "groups of 0"),
    ({**GPTQ, "bits": 3}, gptq_module(), "of 3 bits"),
    ({**GPTQ, "bits": 8}, gptq_module(), "contradicts the weights"),
    ({**GPTQ, "checkpoint_format": "marlin"}, gptq_module(), "GPTQ's format marlin"),
    ({**GPTQ, "is_marlin_format": True}, gptq_module(), "GPTQ's format marlin"),
    (GPTQ, gptq_module(g_idx=torch.full((128,), 4, dtype=torch.int32)), "names the groups 4 to 4, but there are 4"),
    (GPTQ, gptq_module(g_idx=torch.zeros(100, dtype=torch.int32)), r"g_idx has shape \[100\]"),
    (GPTQ, gptq_module(qweight=torch.zeros(16, 16)), "qweight is F32"),
    ({**GPTQ, "dynamic": {"-:pro.*": {}}}, gptq_module(), "although '-:pro.*'"),
    ({**GPTQ, "dynamic": {"+:(": {}}}, gptq_module(), "not a regular expression"),
    ({**AWQ, "version": "gemv_fast"}, gptq_module(), "AWQ's layout gemv_fast"),
    ({**AWQ, "bits": 8}, gptq_module(), "AWQ weights of 8 bits"),
    (AWQ, gptq_module(), "lacks its qweight|shape|g_idx"),
    ({**AWQ, "group_size": "all"}, {}, "groups of all"),
    (AWQ, {"mlp.act.scales": torch.ones(4)}, "divides activations by mlp.act.scales"),
    (compressed() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, {}, "compressed with sparsity_config"),
    (compressed() | {"transform_config": {"config_groups": {"u": {}}}}, {}, "compressed with transform_config"),
    (compressed() | {"format": "marlin-24"}, module({"weight_packed": torch.zeros(1)}), "compressed as marlin-24"),
    (compressed(3), module({"weight_packed": torch.zeros(1)}), "to 3 bits"),
    (compressed(strategy="block"), module({"weight_packed": torch.zeros(1)}), "by block"),
    (compressed() | {"config_groups": {}}, module({"weight_packed": torch.zeros(1)}), "no group of quant"),
    ({"quant_method": "mxfp4"}, {"x_blocks": torch.zeros(1, 2, 3, 16, dtype=torch.uint8)}, "no scales beside it"),
    ({"quant_method": "mxfp4"}, {"x_scales": torch.zeros(1, 2, 3, dtype=torch.uint8)}, "no blocks beside it"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "tensors", "words"), REFUSED)
def test_what_does_not_fit_together_is_refused(
    config: dict[str, Any], tensors: dict[str, torch.Tensor], words: str, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match=words) as raised:
        Checkpoint(Files(written(tmp_path, config, tensors)), np.dtype(np.float32)).close()
    assert "\n" not in str(raised.value)


def packed_module(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    tensors = made.pack_quantized(made.random_matrix(16, 128, 4, 32), 4)
    tensors |= {name: value for name, value in changes.items() if value is not None}
    return module({name: value for name, value in tensors.items() if changes.get(name, value) is not None})


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (packed_module(weight_scale=None), "lacks its weight_scale"),
        (packed_module(weight_packed=None), "lacks its weight_packed"),
        (packed_module(weight_zero_point=None), "lacks its weight_zero_point"),
        (packed_module(weight_shape=torch.tensor([16, 160])), r"weight_shape is \[16, 160\], but weight_packed"),
        (packed_module(weight_scale=torch.ones(16, 2)), r"weight_scale has shape \[16, 2\]"),
        (packed_module(weight_zero_point=torch.zeros(2, 3, dtype=torch.int32)), "weight_zero_point has shape"),
    ],
)
def test_compressed_tensors_that_do_not_fit_together_are_refused(
    tensors: dict[str, torch.Tensor], words: str, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match=words):
        Checkpoint(Files(written(tmp_path, compressed(symmetric=False), tensors)), np.dtype(np.float32)).close()
