"""compressed-tensors, as llm-compressor writes it: integers of 2, 4 or 8 bits, w[n, k] = (code - zero) * scale.

    pack-quantized    weight_packed int32 [N, ceil(K * bits / 32)], codes along K, unsigned, lower index in lower bits;
                      weight_zero_point int32 [ceil(N * bits / 32), G], packed along N; weight_shape [2]
    int-quantized     weight int8 [N, K]; weight_zero_point int8 [N, G]; both signed
    both              weight_scale [N, G], one column for strategy channel; weight_g_idx [K] with actorder group

What the checkpoint asks of activations is not done: they stay as they are. The format is documented in
https://github.com/vllm-project/compressed-tensors (compressors/, quantization/).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from fmedge_runtimes.errors import SourceError

from fmedge_converters.formats.grouped import BITS, GroupedMatrix, grouped_weight, packed, unpacked
from fmedge_converters.formats.modules import QuantizedModule, group_indices, quantized_modules, read_all
from fmedge_converters.formats.plain import FLOATS, plain_weight
from fmedge_converters.stored import Format, Storage, StoredTensor
from fmedge_converters.weight import Array, Read, Weight

METHODS = ("compressed-tensors", "compressed_tensors")
PACKED = "pack-quantized"
INTEGER = ("int-quantized", "naive-quantized")
ACTIVATIONS = re.compile(r".*\.((input|output)_(scale|zero_point|global_scale)|[kqv]_(scale|zero_point))")
"""Tensors about activations and the cache."""
PARTS = ("weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
STRATEGIES = ("group", "channel", "tensor")


def decode_compressed_tensors(storage: Storage) -> dict[str, Weight]:
    """The weights of a compressed-tensors checkpoint.

    Raises SourceError: a compression that fmedge does not read, a tensor that is missing or has a wrong shape.
    """
    config = storage.quantization
    for key in ("sparsity_config", "transform_config"):
        value = config.get(key) or {}
        if value and value.get("format") != "dense":
            raise SourceError(f"{storage.folder} is compressed with {key} too, which fmedge does not read.")
    kept = {name: tensor for name, tensor in storage.tensors.items() if not ACTIVATIONS.fullmatch(name)}
    compressed = {name.rpartition(".")[0] for name in kept if name.endswith((".weight_scale", ".weight_packed"))}
    own = {name: tensor for name, tensor in kept.items() if name.rpartition(".")[0] in compressed}
    modules, rest = quantized_modules(own, ("weight_packed", "weight"), PARTS)
    plain = {name: tensor for name, tensor in kept.items() if name not in own} | rest
    weights = {name: plain_weight(tensor, storage.dtype) for name, tensor in plain.items()}
    for module in modules:
        weights[f"{module.name}.weight"] = grouped_weight(_matrix(module, config), storage.dtype)
    return weights


def _arguments(config: Mapping[str, Any], module: QuantizedModule) -> tuple[str, Mapping[str, Any]]:
    """Format and weight arguments of the group whose target is the module's name, else of the one for its class."""
    groups = list((config.get("config_groups") or {}).values())
    named = [group for group in groups if any(_names(target, module.name) for target in group["targets"])]
    classes = [group for group in groups if any(target.isidentifier() for target in group["targets"])]
    for group in [*named, *classes]:
        if group.get("weights"):
            return str(group.get("format") or config.get("format")), group["weights"]
    raise SourceError(f"{module.where} is compressed, but no group of quantization_config is for it.")


def _names(target: str, name: str) -> bool:
    """Whether a target is this module's name, or a pattern for it."""
    return re.match(target[3:], name) is not None if target.startswith("re:") else target == name


def _matrix(module: QuantizedModule, config: Mapping[str, Any]) -> GroupedMatrix:
    kind, arguments = _arguments(config, module)
    bits, strategy = arguments.get("num_bits"), arguments.get("strategy")
    strategy = strategy or ("group" if arguments.get("group_size") else "tensor")
    if kind not in (PACKED, *INTEGER) or arguments.get("type", "int") != "int":
        raise SourceError(
            f"{module.where} is compressed as {kind} ({arguments.get('type')}); fmedge reads {PACKED} and {INTEGER[0]}."
        )
    if bits not in BITS or strategy not in STRATEGIES:
        raise SourceError(
            f"{module.where} is compressed to {bits} bits by {strategy}; fmedge reads {', '.join(map(str, BITS))} bits "
            f"by {', '.join(STRATEGIES)}."
        )
    weight = module.part("weight_packed", ("I32",)) if kind == PACKED else module.part("weight", ("I8",))
    rows, columns = _shape(module, weight, bits) if kind == PACKED else (weight.shape[0], weight.shape[1])
    group_size = int(arguments["group_size"]) if strategy == "group" else columns
    if group_size < 1:
        raise SourceError(f"{module.where} is compressed in groups of {group_size}, which is no size.")
    count = -(-columns // group_size)
    scale = module.part("weight_scale", FLOATS, dimensions=1 if strategy == "tensor" else 2)
    module.check("weight_scale", (1,) if strategy == "tensor" else (rows, count))

    def codes(start: int, stop: int) -> Array:
        data = weight.read(start, stop).contiguous().numpy()
        if kind == PACKED:
            return data.astype("<i4", copy=False).view(np.uint8)  # [n, 4 * words]
        return packed((data.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8), bits)

    def scales(start: int, stop: int) -> torch.Tensor:
        return read_all(scale).expand(stop - start, 1) if strategy == "tensor" else scale.read(start, stop)

    zeros = None
    if "weight_zero_point" in module.parts or not arguments.get("symmetric", True):
        zeros = _zeros(module, bits, rows, count)
    indices = None
    if "weight_g_idx" in module.parts:
        indices = group_indices(module, "weight_g_idx", columns, count)
    return GroupedMatrix(module.where, (rows, columns), bits, group_size, codes, scales, zeros, indices)


def _shape(module: QuantizedModule, weight: StoredTensor, bits: int) -> tuple[int, int]:
    """[N, K], from weight_shape, which knows what the last word of a row is padded by."""
    rows, words = weight.shape
    if "weight_shape" not in module.parts:
        return rows, words * 32 // bits
    stored = read_all(module.part("weight_shape", ("I64", "I32"), dimensions=1)).tolist()
    if len(stored) != 2 or stored[0] != rows or -(-stored[1] * bits // 32) != words:
        raise SourceError(
            f"{module.where}.weight_shape is {stored}, but weight_packed is {[rows, words]} at {bits} bits; "
            "quantization_config contradicts the weights."
        )
    return rows, int(stored[1])


def _zeros(module: QuantizedModule, bits: int, rows: int, count: int) -> Read:
    stored = module.part("weight_zero_point", ("I32", "I8"))
    middle = 1 << (bits - 1)
    if stored.dtype == "I8":
        module.check("weight_zero_point", (rows, count))
        return lambda start, stop: (stored.read(start, stop).numpy().astype(np.int16) + middle).astype(np.uint8)
    module.check("weight_zero_point", (-(-rows * bits // 32), count))
    each = 32 // bits

    def read(start: int, stop: int) -> Array:
        first = start // each
        words = stored.read(first, -(-stop // each)).T.contiguous().numpy()  # [G, words]
        values = unpacked(words.astype("<i4", copy=False).view(np.uint8), bits).T  # [n', G]
        return np.ascontiguousarray(values[start - first * each :][: stop - start])

    return read


COMPRESSED_TENSORS = Format(
    "compressed-tensors", lambda quantization: quantization.get("quant_method") in METHODS, decode_compressed_tensors
)
