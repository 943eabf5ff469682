"""GGUF's types, by blocks of 32 weights or more, and its names.

    Q4_0    fp16 d, 16 bytes            w = (code - 8) * d; byte i has code i in its low half, i + 16 in its high one
    Q4_1    fp16 d, fp16 m, 16 bytes    w = code * d + m
    Q8_0    fp16 d, 32 signed bytes     w = byte * d

Those three have the form of MatMulNBits (Q4_1 only where m is a multiple of d) and keep their codes. Every other type
is read by the `gguf` package, to the bit as llama.cpp and transformers read it. Names, and what llama.cpp changed of
the tensors (the rows of llama's rotary heads, norms plus one), are undone by transformers' own tables.
Definition of the types: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and src/ggml-quants.c.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from fmedge_runtimes.errors import SourceError
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from transformers import PreTrainedModel
from transformers.integrations.gguf import get_gguf_conversion_mapping, is_gguf_arch_supported
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from fmedge_converters.conversion import converted
from fmedge_converters.formats.grouped import GroupedMatrix, grouped_weight, packed
from fmedge_converters.formats.plain import FLOATS, INTEGERS, plain_weight
from fmedge_converters.stored import Format, Storage, StoredTensor
from fmedge_converters.weight import (
    Array,
    Read,
    Weight,
    concatenated,
    mapped,
    reshaped,
    selected,
    transposed,
    weight_from_array,
)

METHOD = "gguf"
BLOCK = 32
FLOAT32 = np.dtype(np.float32)
GATE, UP = "ffn_gate_exps.weight", "ffn_up_exps.weight"
FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors of the rotary embedding, which the configuration has taken."""
CHECKED_ROWS = 1024
"""Rows that are looked at together when a tensor is searched for something."""


def decode_gguf(storage: Storage) -> dict[str, Weight]:
    """The weights of a GGUF file, by its own names.

    Raises SourceError for a type that the `gguf` package cannot read.
    """
    return {name: _weight(tensor, storage.dtype) for name, tensor in storage.tensors.items()}


def _weight(tensor: StoredTensor, dtype: np.dtype[np.generic]) -> Weight:
    if tensor.dtype in FLOATS or tensor.dtype in INTEGERS:
        return plain_weight(tensor, dtype)
    if len(tensor.shape) < 2:
        raise SourceError(
            f"{tensor.file}: {tensor.name} is a vector of type {tensor.dtype}, which ggml has for matrices."
        )
    matrix = _as_matrix(tensor)
    grouped = GROUPED[tensor.dtype](matrix) if tensor.dtype in GROUPED else None
    if grouped is not None:
        return reshaped(grouped_weight(grouped, dtype), tensor.shape)
    kind = GGMLQuantizationType[tensor.dtype]
    try:
        quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError as error:
        raise SourceError(
            f"{tensor.file}: {tensor.name} is of type {tensor.dtype}, which fmedge cannot read."
        ) from error

    def read(start: int, stop: int) -> Array:
        values = quants.dequantize(tensor.read(start, stop).numpy(), kind)
        return values.reshape(stop - start, *tensor.shape[1:]).astype(dtype, copy=False)

    return Weight(tensor.shape, dtype, read)


def _as_matrix(tensor: StoredTensor) -> StoredTensor:
    """A tensor [E, N, K] as the matrix [E * N, K] of its rows."""
    rows = math.prod(tensor.shape[1:-1])  # N

    def read(start: int, stop: int) -> torch.Tensor:
        first = start // rows
        found = tensor.read(first, -(-stop // rows))
        return found.reshape(-1, found.shape[-1])[start - first * rows : stop - first * rows]

    if len(tensor.shape) == 2:
        return tensor
    return replace(tensor, shape=(math.prod(tensor.shape[:-1]), tensor.shape[-1]), read=read)


def _fields(tensor: StoredTensor, start: int, stop: int) -> Array:
    """The blocks of rows, uint8 [n, K / 32, bytes]."""
    size = GGML_QUANT_SIZES[GGMLQuantizationType[tensor.dtype]][1]
    return tensor.read(start, stop).numpy().reshape(stop - start, -1, size)


def _halves(fields: Array, place: int) -> Array:
    """The fp16 number at a place of each block, [n, K / 32]."""
    return np.ascontiguousarray(fields[..., place : place + 2]).view("<f2")[..., 0]


def _grouped(tensor: StoredTensor, bits: int, codes: Callable[[Array], Array], zeros: Read | None) -> GroupedMatrix:
    """`codes` gets blocks [n, K / 32, bytes] and returns one code each, [n, K / 32, 32]."""

    def read_codes(start: int, stop: int) -> Array:
        return packed(codes(_fields(tensor, start, stop)).reshape(stop - start, -1), bits)

    def scales(start: int, stop: int) -> torch.Tensor:
        return torch.from_numpy(_halves(_fields(tensor, start, stop), 0))

    name = f"{tensor.file}: {tensor.name}"
    rows, columns = tensor.shape
    return GroupedMatrix(name, (rows, columns), bits, BLOCK, read_codes, scales, zeros)


def _nibbles(pairs: Array) -> Array:
    """Codes of bytes [..., 16]: those in the low halves, then those in the high ones."""
    return np.concatenate([pairs & 15, pairs >> 4], axis=-1)


def _q4_0(tensor: StoredTensor) -> GroupedMatrix:
    return _grouped(tensor, 4, lambda fields: _nibbles(fields[..., 2:]), None)


def _q8_0(tensor: StoredTensor) -> GroupedMatrix:
    return _grouped(tensor, 8, lambda fields: fields[..., 2:] ^ 0x80, None)


def _q4_1(tensor: StoredTensor) -> GroupedMatrix | None:
    """None when a block's minimum is no multiple of its scale within 15 steps, so that no zero point stands for it."""

    def zeros(start: int, stop: int) -> Array:
        fields = _fields(tensor, start, stop)
        scale, least = (_halves(fields, place).astype(np.float64) for place in (0, 2))
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(least == 0, 0, -least / scale)

    for start in range(0, tensor.shape[0], CHECKED_ROWS):
        found = zeros(start, min(start + CHECKED_ROWS, tensor.shape[0]))
        # Quotients of two numbers of 11 bits are exact in 53 when they are integers.
        if not np.isin(found, np.arange(16)).all():
            return None
    return _grouped(
        tensor, 4, lambda fields: _nibbles(fields[..., 4:]), lambda start, stop: zeros(start, stop).astype(np.uint8)
    )


GROUPED: Mapping[str, Callable[[StoredTensor], GroupedMatrix | None]] = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q8_0": _q8_0}


def named_gguf(storage: Storage, tensors: Mapping[str, Weight], model: PreTrainedModel) -> Mapping[str, Weight]:
    """The tensors by the names of transformers' model, as it has them.

    Raises SourceError: transformers has no table for the architecture, or none of its names is for a tensor.
    """
    architecture = str(storage.quantization["architecture"])
    if is_gguf_arch_supported(architecture):
        # Norms plus one and the like in fp32, where they are exact.
        exact = {
            name: _weight(storage.tensors[name], FLOAT32) for name, weight in tensors.items() if _is_vector(weight)
        }
        transforms = get_gguf_conversion_mapping(architecture, model.config)
        made = converted({**tensors, **exact}, model, transforms=transforms)
        return {name: _cast(weight, storage.dtype) for name, weight in made.items()}
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())
    try:
        names = get_gguf_hf_weights_map(model, processor)
    except (NotImplementedError, KeyError) as error:
        raise SourceError(f"{storage.folder}: transformers has no names for GGUF's {architecture}.") from error
    parts: dict[str, list[str]] = {}
    for name in tensors:
        target = names.get(name) or names.get(name.removesuffix(".weight"))
        if target is not None:
            parts.setdefault(target, []).append(name)
        elif name not in FACTORS:
            raise SourceError(
                f"{storage.folder}: {name} has no place in transformers' {model.config.model_type}; without it the "
                "model would compute something else."
            )
    made = {name: _processed(storage, processor, name, tensors[name]) for group in parts.values() for name in group}
    return {target: _joined(storage, target, {name: made[name] for name in group}) for target, group in parts.items()}


def _joined(storage: Storage, target: str, weights: Mapping[str, Weight]) -> Weight:
    """The tensors of one parameter: gate and up of all experts [E, I, H] become [E, 2 * I, H]."""
    if len(weights) == 1:
        return next(iter(weights.values()))
    gate = [name for name in weights if name.endswith(GATE)]
    up = [name.replace(GATE, UP) for name in gate]
    if len(gate) != 1 or set(weights) != {*gate, *up}:
        raise SourceError(f"{storage.folder}: {' and '.join(weights)} are all {target} of transformers' model.")
    return concatenated([weights[gate[0]], weights[up[0]]], axis=1)


def _is_vector(weight: Weight) -> bool:
    return len(weight.shape) < 2


def _cast(weight: Weight, dtype: np.dtype[np.generic]) -> Weight:
    return weight if weight.dtype == dtype else mapped(lambda rows: rows.astype(dtype), [weight], dtype)


def _processed(storage: Storage, processor: TensorProcessor, name: str, weight: Weight) -> Weight:
    """What transformers' processor makes of a tensor, found out on the numbers of its rows.

    A permutation of rows or a transpose is done without reading, so that codes survive; anything else is done to the
    whole tensor.
    """
    if len(weight.shape) > 2:
        return weight
    rows = weight.shape[0]
    probe = np.arange(rows, dtype=np.float64)
    if len(weight.shape) == 2:
        probe = np.stack([probe, probe + rows], axis=1)  # [N, 2], no number twice
    try:
        seen = np.asarray(_process(processor, name, probe))
    except (ValueError, IndexError):
        seen = np.empty(0)
    if seen.shape == probe.shape and np.array_equal(seen, probe):
        return weight
    if seen.shape == probe.shape:
        order = (seen if seen.ndim == 1 else seen[:, 0]).astype(np.int64)
        if np.array_equal(np.sort(order), np.arange(rows)) and np.array_equal(seen, probe[order]):
            return selected(weight, 0, order)
    if seen.ndim == 2 and np.array_equal(seen, probe.T):
        return transposed(weight)
    # A norm plus one, for example, which only fp32 has exactly.
    whole = _process(processor, name, _weight(storage.tensors[name], FLOAT32).array())
    return weight_from_array(np.ascontiguousarray(whole, weight.dtype))


def _process(processor: TensorProcessor, name: str, array: Array) -> Array:
    with np.errstate(all="ignore"):
        result = processor.process(array, name, tensor_key_mapping={}, parsed_parameters={"tensors": {}})
    return np.asarray(result.weights)


GGUF = Format("GGUF", lambda quantization: quantization.get("quant_method") == METHOD, decode_gguf, named_gguf)
