"""MXFP4, as gpt_oss stores its experts: 32 values of E2M1 share a power of two.

    X_blocks  uint8 [E, R, G, 16]    two values in a byte, the lower index in its low half
    X_scales  uint8 [E, R, G]        exponents, plus 127
    X[e, k, r] = value * 2 ** exponent, [E, G * 32, R]

No operator with integer codes has these values, so the weights are read, exactly, and quantized like any others.
Definition: OCP Microscaling Formats (MX) 1.0; the layout is that of transformers (integrations/mxfp4.py).
"""

from __future__ import annotations

import numpy as np
import torch
from fmedge_runtimes.errors import SourceError

from fmedge_converters.formats.grouped import floats
from fmedge_converters.formats.plain import plain_weight
from fmedge_converters.stored import Format, Storage, StoredTensor
from fmedge_converters.weight import Array, Weight

VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""By code: sign, two bits of exponent, one of mantissa."""
BIAS = 127
BLOCK = 32


def decode_mxfp4(storage: Storage) -> dict[str, Weight]:
    """The weights of a checkpoint with MXFP4 experts.

    Raises SourceError: blocks without scales, or with scales of another shape.
    """
    weights: dict[str, Weight] = {}
    for name, tensor in storage.tensors.items():
        if name.endswith("_scales") and tensor.dtype == "U8":
            if f"{name.removesuffix('_scales')}_blocks" not in storage.tensors:
                raise SourceError(f"{tensor.file}: {name} has no blocks beside it: the checkpoint is incomplete.")
        elif name.endswith("_blocks") and tensor.dtype == "U8":
            stem = name.removesuffix("_blocks")
            weights[stem] = _expert_weight(tensor, storage.tensors.get(f"{stem}_scales"), storage.dtype)
        else:
            weights[name] = plain_weight(tensor, storage.dtype)
    return weights


def _expert_weight(blocks: StoredTensor, scales: StoredTensor | None, dtype: np.dtype[np.generic]) -> Weight:
    where = f"{blocks.file}: {blocks.name}"
    if scales is None:
        raise SourceError(f"{where} has no scales beside it: the checkpoint is incomplete; download or copy it again.")
    shape = blocks.shape
    if len(shape) != 4 or shape[3] * 2 != BLOCK or scales.shape != shape[:3] or scales.dtype != "U8":
        raise SourceError(
            f"{where} and its scales are {list(shape)} and {scales.dtype} {list(scales.shape)}; MXFP4 has "
            f"[experts, rows, groups, {BLOCK // 2}] and U8 [experts, rows, groups]."
        )
    experts, rows, groups, _ = shape

    def read(start: int, stop: int) -> Array:
        result = np.empty((stop - start, groups * BLOCK, rows), dtype)  # [e, K, R]
        for expert in range(start, stop):
            codes = blocks.read(expert, expert + 1)[0].numpy()  # [R, G, 16]
            exponents = scales.read(expert, expert + 1)[0].numpy().astype(np.int32) - BIAS  # [R, G]
            values = np.empty((rows, groups, BLOCK), np.float32)
            values[..., 0::2], values[..., 1::2] = VALUES[codes & 15], VALUES[codes >> 4]
            values = np.ldexp(values, exponents[..., None])
            result[expert - start] = floats(torch.from_numpy(values), dtype, where).reshape(rows, -1).T
        return result

    return Weight((experts, groups * BLOCK, rows), dtype, read)


MXFP4 = Format("MXFP4", lambda quantization: quantization.get("quant_method") == "mxfp4", decode_mxfp4)
