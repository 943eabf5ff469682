"""Numbers stored one by one, in a floating type or as integers."""

from __future__ import annotations

import numpy as np
from fmedge_runtimes.errors import SourceError

from fmedge_converters.lazy_tensor import torch_dtype
from fmedge_converters.stored import Format, Storage, StoredTensor
from fmedge_converters.weight import UNREADABLE, Array, Weight

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
INTEGERS: dict[str, np.dtype[np.generic]] = {
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
CODES = (".qweight", ".weight_packed", "_proj_blocks")
"""Ends of the names that quantizers give to codes."""


def plain_weight(tensor: StoredTensor, dtype: np.dtype[np.generic]) -> Weight:
    """The weight of a tensor as it is stored: floats are converted to `dtype`, integers stay what they are."""
    kind = dtype if tensor.dtype in FLOATS else INTEGERS.get(tensor.dtype)
    if kind is None:
        return _unreadable(tensor)
    target = torch_dtype(kind)

    def read(start: int, stop: int) -> Array:
        array: Array = tensor.read(start, stop).to(target).contiguous().numpy()
        return array

    return Weight(tensor.shape, kind, read)


def _unreadable(tensor: StoredTensor) -> Weight:
    def read(_start: int, _stop: int) -> Array:
        raise SourceError(f"{tensor.file}: {tensor.name} is stored as {tensor.dtype}, which fmedge does not read.")

    return Weight(tensor.shape, UNREADABLE, read)


def decode_plain(storage: Storage) -> dict[str, Weight]:
    """Each tensor as it is. Raises SourceError for codes, or scales beside tensors, which only quantizers write."""
    for name, tensor in storage.tensors.items():
        if name.endswith(CODES):
            raise SourceError(
                f"{tensor.file}: {name} holds a quantizer's codes, but config.json has no quantization_config "
                "that says how to read them; copy config.json from where the weights came."
            )
        scale = next((name + end for end in ("_scale_inv", "_scale") if name + end in storage.tensors), None)
        if tensor.dtype.startswith("F8") and scale is not None:
            raise SourceError(
                f"{tensor.file}: {name} is stored in 8 bits with a scale ({scale}), but config.json has no "
                "quantization_config that says how to use it; copy config.json from where the weights came."
            )
    return {name: plain_weight(tensor, storage.dtype) for name, tensor in storage.tensors.items()}


PLAIN = Format("floats", lambda quantization: not quantization, decode_plain)
