"""AWQ, as AutoAWQ and GPTQModel write it, 4 bits: w[n, k] = (code - zero) * scale.

    gemm    qweight int32 [K, N / 8], qzeros int32 [G, N / 8], scales [G, N]; eight neighbours along N in a word,
            in the order 0 2 4 6 1 3 5 7 from its lowest bits on
    gemv    qweight int32 [N, K / 8], qzeros int32 [N, Z], scales [N, 8 Z]; along K, in order, Z padded beyond G / 8

Layouts: https://github.com/casper-hansen/AutoAWQ (awq/modules/linear).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from fmedge_runtimes.errors import SourceError

from fmedge_converters.formats.grouped import GroupedMatrix, grouped_weight, packed, unpacked
from fmedge_converters.formats.modules import QuantizedModule, quantized_modules, read_all
from fmedge_converters.formats.plain import FLOATS, plain_weight
from fmedge_converters.stored import Format, Storage
from fmedge_converters.weight import Array, Weight

BITS = 4
NEIGHBOURS = 8
"""Codes in a word."""
SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)
"""Of the codes of a word, in the order of their columns."""


def decode_awq(storage: Storage) -> dict[str, Weight]:
    """The weights of an AWQ checkpoint.

    Raises SourceError: an unknown layout, a tensor that is missing or has a wrong shape.
    """
    config = storage.quantization
    layout = str(config.get("version") or config.get("format") or config.get("checkpoint_format") or "gemm").lower()
    if layout not in LAYOUTS:
        raise SourceError(
            f"{storage.folder} is stored in AWQ's layout {layout}, for one kernel; fmedge reads {', '.join(LAYOUTS)}."
        )
    bits = config.get("bits", config.get("w_bit", BITS))
    if bits != BITS:
        raise SourceError(f"{storage.folder} has AWQ weights of {bits} bits; the format is defined for {BITS}.")
    group_size = config.get("group_size", config.get("q_group_size", 128))
    if not isinstance(group_size, int) or (group_size < 1 and group_size != -1):
        raise SourceError(f"{storage.folder} has AWQ weights in groups of {group_size}, which is no size.")
    scaled = [name for name in storage.tensors if name.endswith(".act.scales")]
    if scaled:
        raise SourceError(
            f"{storage.folder} divides activations by {scaled[0]}, which transformers' model does not do."
        )
    modules, rest = quantized_modules(storage.tensors, ("qweight",), ("qzeros", "scales"))
    weights = {name: plain_weight(tensor, storage.dtype) for name, tensor in rest.items()}
    for module in modules:
        weights[f"{module.name}.weight"] = grouped_weight(LAYOUTS[layout](module, group_size), storage.dtype)
    return weights


def _gemm(module: QuantizedModule, group_size: int) -> GroupedMatrix:
    qweight, qzeros = module.part("qweight", ("I32",)), module.part("qzeros", ("I32",))
    scales = module.part("scales", FLOATS)
    columns, rows = qweight.shape[0], qweight.shape[1] * NEIGHBOURS  # K, N
    group_size = columns if group_size == -1 else group_size
    count = -(-columns // group_size)
    module.check("scales", (count, rows))
    module.check("qzeros", (count, rows // NEIGHBOURS))
    return GroupedMatrix(
        module.where,
        (rows, columns),
        BITS,
        group_size,
        lambda start, stop: packed(_across(read_all(qweight), start, stop), BITS),
        lambda start, stop: read_all(scales)[:, start:stop].T,
        lambda start, stop: _across(read_all(qzeros), start, stop),
    )


def _across(words: torch.Tensor, start: int, stop: int) -> Array:
    """Codes [n, M] of the columns start:stop of words [M, N / 8]."""
    first = start // NEIGHBOURS
    found = words[:, first : -(-stop // NEIGHBOURS)].T.contiguous().numpy().view(np.uint32)  # [words, M]
    codes = np.empty((len(found), NEIGHBOURS, found.shape[1]), np.uint8)
    for column, shift in enumerate(SHIFTS):
        codes[:, column] = (found >> shift) & 15
    return codes.reshape(-1, found.shape[1])[start - first * NEIGHBOURS :][: stop - start]


def _gemv(module: QuantizedModule, group_size: int) -> GroupedMatrix:
    qweight, qzeros = module.part("qweight", ("I32",)), module.part("qzeros", ("I32",))
    scales = module.part("scales", FLOATS)
    rows, columns = qweight.shape[0], qweight.shape[1] * NEIGHBOURS  # N, K
    group_size = columns if group_size == -1 else group_size
    count = -(-columns // group_size)
    width = max(qzeros.shape[1], -(-count // NEIGHBOURS))
    module.check("qzeros", (rows, width))
    module.check("scales", (rows, width * NEIGHBOURS))
    return GroupedMatrix(
        module.where,
        (rows, columns),
        BITS,
        group_size,
        lambda start, stop: _bytes(qweight.read(start, stop)),
        lambda start, stop: scales.read(start, stop)[:, :count],
        lambda start, stop: unpacked(_bytes(qzeros.read(start, stop)), BITS)[:, :count],
    )


def _bytes(words: torch.Tensor) -> Array:
    """Words [n, m] as bytes [n, 4 m], the lowest first."""
    return words.contiguous().numpy().astype("<i4", copy=False).view(np.uint8)


LAYOUTS: dict[str, Callable[[QuantizedModule, int], GroupedMatrix]] = {"gemm": _gemm, "gemv": _gemv}

AWQ = Format("AWQ", lambda quantization: quantization.get("quant_method") == "awq", decode_awq)
