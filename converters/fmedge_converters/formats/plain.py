"""Floating-point tensors, stored one by one."""

from __future__ import annotations

import numpy as np
import torch
from fmedge_runtimes.errors import SourceError

from fmedge_converters.stored import Format, Storage, StoredTensor
from fmedge_converters.weight import Array, Weight

FLOATS = ("F64", "F32", "F16", "BF16")


def plain_weight(tensor: StoredTensor, dtype: np.dtype[np.generic]) -> Weight:
    """The weight of a tensor that is stored as floats.

    Raises SourceError when it is stored as something else; reading raises it for values that fp16 cannot hold.
    """
    if tensor.dtype not in FLOATS:
        raise SourceError(
            f"{tensor.file}: {tensor.name} is stored as {tensor.dtype}, but config.json names no quantization that "
            f"would explain it; export the model from its {', '.join(FLOATS)} checkpoint."
        )
    kind = torch.from_numpy(np.empty(0, dtype)).dtype

    def read(start: int, stop: int) -> Array:
        array: Array = tensor.read(start, stop).to(kind).contiguous().numpy()
        if dtype == np.float16 and not np.isfinite(array).all():
            raise SourceError(
                f"{tensor.file}: {tensor.name} has values beyond fp16's range (65504) or not finite; "
                "this model cannot run in fp16."
            )
        return array

    return Weight(tensor.shape, dtype, read)


def decode_plain(storage: Storage) -> dict[str, Weight]:
    """Each tensor as it is."""
    return {name: plain_weight(tensor, storage.dtype) for name, tensor in storage.tensors.items()}


PLAIN = Format("floats", lambda quantization: not quantization, decode_plain)
