"""GPTQ, as AutoGPTQ, GPTQModel and optimum write it.

    qweight  int32 [K * bits / 32, N]    codes along K, the lower index in the lower bits
    qzeros   int32 [G, N * bits / 32]    zero points along N; `gptq` stores each minus one, `gptq_v2` does not
    scales   [G, N]
    g_idx    int32 [K]                   the group of each input feature; in disorder with desc_act
    w[n, k] = (code - zero) * scale

Formats and their names: https://github.com/ModelCloud/GPTQModel (quantization/config.py, nn_modules/qlinear).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from fmedge_runtimes.errors import SourceError

from fmedge_converters.formats.grouped import BITS, GroupedMatrix, grouped_weight, unpacked
from fmedge_converters.formats.modules import QuantizedModule, group_indices, quantized_modules, read_all
from fmedge_converters.formats.plain import FLOATS, plain_weight
from fmedge_converters.stored import Format, Storage
from fmedge_converters.weight import Array, Weight

OFFSETS = {"gptq": 1, "gptq_v2": 0}
"""What a stored zero point lacks, by the checkpoint's format."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How one module is quantized."""

    bits: int
    group_size: int
    """-1: the whole row."""


def decode_gptq(storage: Storage) -> dict[str, Weight]:
    """The weights of a GPTQ checkpoint.

    Raises SourceError: an unknown layout, a tensor that is missing or has a wrong shape.
    """
    config = storage.quantization
    kind = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
    if kind not in OFFSETS or config.get("is_marlin_format"):
        kind = "marlin" if config.get("is_marlin_format") else kind
        raise SourceError(
            f"{storage.folder} is stored in GPTQ's format {kind}, for one kernel; fmedge reads {', '.join(OFFSETS)}."
        )
    modules, rest = quantized_modules(storage.tensors, ("qweight",), ("qzeros", "scales", "g_idx"))
    weights = {name: plain_weight(tensor, storage.dtype) for name, tensor in rest.items()}
    for module in modules:
        matrix = _matrix(module, _settings(config, module), OFFSETS[kind])
        weights[f"{module.name}.weight"] = grouped_weight(matrix, storage.dtype)
    return weights


def _settings(config: Mapping[str, Any], module: QuantizedModule) -> Settings:
    """The settings of a module; the first rule of `dynamic` whose pattern matches its name overrides others."""
    found: dict[str, Any] = {key: config.get(key) for key in ("bits", "group_size")}
    for pattern, changes in (config.get("dynamic") or {}).items():
        try:
            matches = re.match(re.sub(r"^[+-]:", "", pattern), module.name)
        except re.error as error:
            raise SourceError(f"quantization_config: {pattern!r} in dynamic is not a regular expression.") from error
        if not matches:
            continue
        if pattern.startswith("-:"):
            raise SourceError(f"{module.where} is quantized although {pattern!r} of quantization_config excludes it.")
        found |= {key: changes[key] for key in found if key in changes}
        break
    bits, group_size = found["bits"], found["group_size"]
    if bits not in BITS:
        raise SourceError(f"{module.where} has GPTQ weights of {bits} bits; fmedge reads {', '.join(map(str, BITS))}.")
    if not isinstance(group_size, int) or (group_size < 1 and group_size != -1):
        raise SourceError(f"{module.where} has GPTQ weights in groups of {group_size}, which is no size.")
    return Settings(bits, group_size)


def _matrix(module: QuantizedModule, settings: Settings, offset: int) -> GroupedMatrix:
    bits = settings.bits
    qweight, qzeros = module.part("qweight", ("I32",)), module.part("qzeros", ("I32",))
    scales = module.part("scales", FLOATS)
    columns, rows = qweight.shape[0] * 32 // bits, qweight.shape[1]  # K, N
    group_size = columns if settings.group_size == -1 else settings.group_size
    count = -(-columns // group_size)
    module.check("scales", (count, rows))
    module.check("qzeros", (count, rows * bits // 32))
    zeros = _zeros(read_all(qzeros), bits, offset)  # [N, G]
    middle = bool((zeros == 1 << (bits - 1)).all())

    def codes(start: int, stop: int) -> Array:
        words = read_all(qweight)[:, start:stop].T.contiguous().numpy()  # [n, K * bits / 32]
        return words.astype("<i4", copy=False).view(np.uint8)  # [n, K * bits / 8]

    return GroupedMatrix(
        module.where,
        (rows, columns),
        bits,
        group_size,
        codes,
        lambda start, stop: read_all(scales)[:, start:stop].T,
        None if middle else lambda start, stop: zeros[start:stop],
        group_indices(module, "g_idx", columns, count),
    )


def _zeros(qzeros: torch.Tensor, bits: int, offset: int) -> Array:
    """Zero points [N, G] of stored words [G, N * bits / 32].

    The offset is added to whole words, as GPTQModel does, which subtracted it so: a zero borrowed from its neighbour.
    """
    ones = sum(offset << shift for shift in range(0, 32, bits))
    words = qzeros.numpy().astype("<u4") + np.uint32(ones)  # [G, N * bits / 32], modulo 2 ** 32
    return np.ascontiguousarray(unpacked(words.view(np.uint8), bits).T)


GPTQ = Format("GPTQ", lambda quantization: quantization.get("quant_method") == "gptq", decode_gptq)
