"""8-bit floats beside their scales: fp8 of DeepSeek, of compressed-tensors and of their kin.

A weight is its stored number times the scale of its tensor, of its row or of its block. How activations were meant to
be rounded does not concern the weights and is left out.

Sources: transformers' integrations/finegrained_fp8.py (Fp8Dequantize) and compressed-tensors' FloatQuantization; the
numbers are theirs, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from fmedge_runtimes.errors import SourceError

from fmedge_converters.formats.plain import plain_weight
from fmedge_converters.lazy_tensor import torch_dtype
from fmedge_converters.stored import Format, Storage, StoredTensor
from fmedge_converters.weight import CHUNK_BYTES, Array, Weight, reshaped

COMPRESSED = "compressed-tensors"
METHODS = ("fp8", "mxfp8", "fbgemm_fp8")
FLOATS8 = ("F8_E4M3", "F8_E5M2")
SCALES = (
    ("", "_scale_inv"),
    ("", "_scale"),
    (".weight", ".scale"),
    (".weight", ".qscale_weight"),
)
"""Where the scale of a tensor lies: what its name loses at the end, and what it gains."""


def decode_scaled(storage: Storage) -> dict[str, Weight]:
    """Every tensor, those of 8 bits multiplied by their scales.

    Raises SourceError: a scale is missing, or its shape does not fit its tensor.
    """
    scaled = [name for name, tensor in storage.tensors.items() if tensor.dtype in FLOATS8 and tensor.shape]
    scales = {name: _beside(storage, name) for name in scaled}
    used = {scale.name for scale in scales.values()}
    return {
        name: scaled_weight(storage, tensor, scales[name]) if name in scales else plain_weight(tensor, storage.dtype)
        for name, tensor in storage.tensors.items()
        if name not in used
    }


def _beside(storage: Storage, name: str) -> StoredTensor:
    for lost, gained in SCALES:
        found = storage.tensors.get(name.removesuffix(lost) + gained) if name.endswith(lost) else None
        if found is not None:
            return found
    tensor = storage.tensors[name]
    raise SourceError(
        f"{tensor.file}: {name} is stored as {tensor.dtype}, but its scale ({name}{SCALES[0][1]} or "
        f"{name}{SCALES[1][1]}) is missing; download or copy the folder again."
    )


def _block(quantization: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of the blocks, if the configuration says."""
    groups = quantization.get("config_groups") or {}
    sizes = [(group.get("weights") or {}).get("block_structure") for group in groups.values()]
    size = quantization.get("weight_block_size") or next((item for item in sizes if item), None)
    return (int(size[0]), int(size[1])) if isinstance(size, Sequence) and len(size) == 2 else None


@dataclass(frozen=True, slots=True)
class _Grid:
    """How scales lie over a tensor: `shape` scales, each for a box of `block` numbers."""

    shape: tuple[int, ...]
    block: tuple[int, ...]


def _grid(tensor: StoredTensor, scale: StoredTensor, block: tuple[int, int] | None) -> _Grid:
    rank = len(tensor.shape)
    if math.prod(scale.shape) == 1:
        shape = (1,) * rank
    elif len(scale.shape) == 1:
        shape = (*scale.shape, *(1,) * (rank - 1))
    else:
        shape = scale.shape
    boxes = []
    for axis, (size, scales) in enumerate(zip(tensor.shape, shape, strict=False)):
        given = block[axis - rank + 2] if block is not None and axis >= rank - 2 else 0
        if scales == 1:
            boxes.append(size)
        elif given and -(-size // given) == scales:
            boxes.append(given)
        elif scales and size % scales == 0:
            boxes.append(size // scales)
    if len(shape) != rank or len(boxes) != rank:
        raise SourceError(
            f"{tensor.file}: {tensor.name} has shape {list(tensor.shape)}, and {list(scale.shape)} of its scale "
            f"{scale.name} does not divide it; the files do not belong together."
        )
    return _Grid(shape, tuple(boxes))


def scaled_weight(storage: Storage, tensor: StoredTensor, scale: StoredTensor) -> Weight:
    """The numbers of a tensor times their scales, computed by blocks of rows.

    Raises SourceError when the scale does not fit the tensor.
    """
    # compressed-tensors multiplies in the type of the scale, the others in fp32.
    own = storage.quantization.get("quant_method") == COMPRESSED
    kind = {"BF16": torch.bfloat16, "F16": torch.float16}.get(scale.dtype, torch.float32) if own else torch.float32
    grid = _grid(tensor, scale, _block(storage.quantization))
    scales = reshaped(_in_float32(scale), grid.shape)
    box = grid.block[0]
    step = max(1, CHUNK_BYTES // max(1, math.prod(tensor.shape[1:]) * 4))

    def spread(start: int, stop: int) -> torch.Tensor:
        """The scale of each number of the rows start:stop; axes with one scale stay of size 1."""
        first, last = (0, 1) if grid.shape[0] == 1 else (start // box, -(-stop // box))
        part = torch.from_numpy(scales.read(first, last)).to(kind)
        for axis in range(1, part.dim()):
            if grid.shape[axis] > 1:
                part = part.repeat_interleave(grid.block[axis], axis).narrow(axis, 0, tensor.shape[axis])
        if grid.shape[0] > 1:
            part = part.repeat_interleave(box, 0)[start - first * box : stop - first * box]
        return part

    def read(start: int, stop: int) -> Array:
        result = np.empty((stop - start, *tensor.shape[1:]), storage.dtype)
        for row in range(start, stop, step):
            end = min(row + step, stop)
            numbers = tensor.read(row, end).to(kind) * spread(row, end)
            result[row - start : end - start] = numbers.to(torch_dtype(storage.dtype)).numpy()
        return result

    return Weight(tensor.shape, storage.dtype, read)


def _in_float32(tensor: StoredTensor) -> Weight:
    def read(start: int, stop: int) -> Array:
        part = tensor.read(start, stop)
        # A byte is an exponent (E8M0).
        part = (part.to(torch.float32) - 127.0).exp2() if tensor.dtype == "U8" else part.to(torch.float32)
        array: Array = part.contiguous().numpy()
        return array

    return Weight(tensor.shape, np.dtype(np.float32), read)


def _matches(quantization: Mapping[str, Any]) -> bool:
    method = quantization.get("quant_method")
    if method == COMPRESSED:
        groups = [group.get("weights") or {} for group in (quantization.get("config_groups") or {}).values()]
        return bool(groups) and all((item.get("type"), item.get("num_bits")) == ("float", 8) for item in groups)
    return method in METHODS or (method == "modelopt" and quantization.get("quant_algo") == "FP8")


SCALED = Format("fp8", _matches, decode_scaled)
