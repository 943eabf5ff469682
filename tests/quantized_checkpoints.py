"""Checkpoints in the formats of quantizers, made element by element from what the formats say of themselves.

Everything here is written with loops over single codes, from the formats' own documentation, so that it shares nothing
with the code under test.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Matrix:
    """Codes [N, K], scales [N, G], zero points [N, G], and the group of each column [K]."""

    codes: np.ndarray
    scales: torch.Tensor
    zeros: np.ndarray
    groups: np.ndarray

    def dequantized(self) -> np.ndarray:
        """[N, K] in fp32, where the formula is exact."""
        scales = self.scales.to(torch.float64).numpy()[:, self.groups]
        zeros = self.zeros.astype(np.float64)[:, self.groups]
        return ((self.codes.astype(np.float64) - zeros) * scales).astype(np.float32)


def random_matrix(
    rows: int,
    columns: int,
    bits: int,
    group_size: int,
    *,
    symmetric: bool = False,
    act_order: bool = False,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> Matrix:
    random = np.random.default_rng(seed)
    size = columns if group_size == -1 else group_size
    count = -(-columns // size)
    groups = np.arange(columns) // size
    if act_order:
        groups = groups[random.permutation(columns)]
    zeros = random.integers(0, 1 << bits, (rows, count))
    if symmetric:
        zeros[:] = 1 << (bits - 1)
    scales = torch.from_numpy(random.uniform(1e-3, 2e-2, (rows, count))).to(dtype)
    return Matrix(random.integers(0, 1 << bits, (rows, columns)), scales, zeros, groups)


def rounded(weight: torch.Tensor, bits: int, group_size: int, *, symmetric: bool, groups: np.ndarray | None) -> Matrix:
    """A weight [N, K] rounded to the nearest code."""
    rows, columns = weight.shape
    size = columns if group_size == -1 else group_size
    count = -(-columns // size)
    groups = np.arange(columns) // size if groups is None else groups
    values = weight.double().numpy()
    codes = np.zeros((rows, columns), np.int64)
    scales, zeros = np.zeros((rows, count), np.float16), np.zeros((rows, count), np.int64)
    top = (1 << bits) - 1
    for group in range(count):
        part = values[:, groups == group]
        if symmetric:
            scale = np.abs(part).max(1) * 2 / top
            zero = np.full(rows, 1 << (bits - 1))
        else:
            low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
            scale = (high - low) / top
            zero = np.clip(np.round(-low / scale), 1, top).astype(np.int64)
        scales[:, group] = scale
        zeros[:, group] = zero
        steps = np.round(part / scales[:, group].astype(np.float64)[:, None]) + zero[:, None]
        codes[:, groups == group] = np.clip(steps, 0, top)
    return Matrix(codes, torch.from_numpy(scales), zeros, groups)


def words(codes: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Codes [n, m] in int32 words [n, ceil(m * bits / 32)], from the lowest bits on."""
    each = 32 // bits
    order = order or tuple(range(each))
    rows, columns = codes.shape
    result = np.zeros((rows, -(-columns // each)), np.uint64)
    for word in range(result.shape[1]):
        for place, neighbour in enumerate(order):
            column = word * each + neighbour
            if column < columns:
                result[:, word] |= codes[:, column].astype(np.uint64) << np.uint64(place * bits)
    return torch.from_numpy(result.astype(np.uint32).view(np.int32))


def awq_gemm(matrix: Matrix, _bits: int = 4) -> dict[str, torch.Tensor]:
    return {
        "qweight": words(matrix.codes.T, 4, AWQ_ORDER),
        "qzeros": words(matrix.zeros.T, 4, AWQ_ORDER),
        "scales": matrix.scales.T.contiguous(),
    }


def awq_gemv(matrix: Matrix, _bits: int = 4) -> dict[str, torch.Tensor]:
    count = matrix.scales.shape[1]
    width = -(-count // 8)
    scales = torch.zeros(len(matrix.codes), width * 8, dtype=matrix.scales.dtype)
    scales[:, :count] = matrix.scales
    return {"qweight": words(matrix.codes, 4), "qzeros": words(matrix.zeros, 4), "scales": scales}


def gptq(matrix: Matrix, bits: int, version: int = 1) -> dict[str, torch.Tensor]:
    zeros = words(matrix.zeros.T, bits)
    if version == 1:  # each zero point minus one, in whole words
        zeros = zeros - sum(1 << shift for shift in range(0, 31, bits))
    return {
        "qweight": words(matrix.codes, bits).T.contiguous(),
        "qzeros": zeros.to(torch.int32),
        "scales": matrix.scales.T.contiguous(),
        "g_idx": torch.from_numpy(matrix.groups.astype(np.int32)),
    }


def pack_quantized(matrix: Matrix, bits: int, act_order: bool = False) -> dict[str, torch.Tensor]:
    tensors = {
        "weight_packed": words(matrix.codes, bits),
        "weight_scale": matrix.scales,
        "weight_shape": torch.tensor(matrix.codes.shape),
    }
    if (matrix.zeros != 1 << (bits - 1)).any():
        tensors["weight_zero_point"] = words(matrix.zeros.T, bits).T.contiguous()
    if act_order:
        tensors["weight_g_idx"] = torch.from_numpy(matrix.groups.astype(np.int32))
    return tensors


FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def mxfp4(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Blocks and scales of a weight [E, K, R], and the weight that they stand for."""
    rows = weight.transpose(1, 2).reshape(*weight.shape[::2], -1, 32).double().numpy()  # [E, R, G, 32]
    exponents = np.ceil(np.log2(np.abs(rows).max(-1) / 6)).astype(int)
    scaled = rows / np.exp2(exponents)[..., None]
    codes = np.abs(scaled[..., None] - FP4).argmin(-1)
    values = (FP4[codes] * np.exp2(exponents)[..., None]).astype(np.float32).reshape(*weight.shape[::2], -1)
    blocks = (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8)
    parts = {"blocks": torch.from_numpy(blocks), "scales": torch.from_numpy((exponents + 127).astype(np.uint8))}
    return parts, torch.from_numpy(values).transpose(1, 2).contiguous()


def write_quantized(
    source: Path,
    folder: Path,
    quantization: dict[str, Any],
    spell: Callable[[str, torch.Tensor], dict[str, torch.Tensor] | None],
) -> Path:
    """A copy of a model folder whose linear layers are spelled as a quantizer would, with its quantization_config.

    `spell` gets a module's name and weight, and returns its tensors or None to leave it.
    """
    folder.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        module = name.removesuffix(".weight")
        spelled = spell(module, tensor) if name.endswith("_proj.weight") else None
        if spelled is None:
            tensors[name] = tensor
        else:
            tensors |= {f"{module}.{part}": value.contiguous() for part, value in spelled.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    if quantization:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    return folder
