"""How long a static cache can be, and for how many rows, on a device whose memory is known.

plan = plan_device(DEVICES["orin-nano-8gb"], needs, wanted=4096)
plan.context, plan.rows, str(plan)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fmedge_runtimes.decoder import PREFILL_CHUNK
from fmedge_runtimes.devices import Device
from fmedge_runtimes.errors import ExportError

from fmedge_converters.recording import LayerCache, LayerState

STATIC_DEFAULT = 4096
"""Tokens of a static cache unless --context says otherwise: every step reads all of it."""
ROWS = 8
"""Rows that are decoded together at most."""
LEAST_CONTEXT = 256
SCALES = 1.04
"""What scales add to quantized weights."""
LIBRARIES = 600 << 20
"""Bytes of CUDA's context and TensorRT's libraries: an estimate."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What a decoder takes, in bytes."""

    weights: int
    token: int
    """Of each token of a row's cache."""
    logits: int
    """Of each token whose logits are asked for."""
    row: int = 0
    """Of each row, however long: the states of recurrent layers."""

    @property
    def fixed(self) -> int:
        """Whatever the length of the cache."""
        return self.weights + LIBRARIES + PREFILL_CHUNK * self.logits


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """A context and a number of rows that fit."""

    device: Device
    needs: Needs
    context: int
    rows: int

    def __str__(self) -> str:
        cache = self.rows * (self.context * self.needs.token + self.needs.row)
        return (
            f"{self.device.product}: weights {_gb(self.needs.weights)}, {self.rows} rows of {self.context} tokens "
            f"{_gb(cache)}, working memory {_gb(self.needs.fixed - self.needs.weights)}, of {_gb(self.device.usable)}"
        )


def decoder_needs(
    caches: Sequence[LayerCache],
    states: Sequence[LayerState],
    itemsize: int,
    bits: int,
    parameters: int,
    embedding: int,
    vocabulary: int,
) -> Needs:
    """What a decoder takes whose matrices have so many bits, and whose cache and embedding have that size of a number.

    A cache that is not updated in place exists twice, and so does a state. A head of 8 bits beside a tied embedding
    counts by itself.
    """
    width = min(bits, 8 * itemsize)
    scales = SCALES if width < 8 * itemsize else 1.0
    head = 0 if width == 8 * itemsize else embedding
    weights = int((parameters - embedding) * width / 8 * scales) + embedding * itemsize + head
    token = sum(
        cache.kv_heads * (cache.key_dim + cache.value_dim) * itemsize * (1 if cache.in_place else 2) for cache in caches
    )
    row = 2 * sum(math.prod(state.shape) * state.dtype.itemsize for state in states)
    return Needs(weights, token, vocabulary * itemsize, row)


def plan_device(device: Device, needs: Needs, wanted: int, *, asked: bool) -> DevicePlan:
    """The longest context up to `wanted` for one row, then as many rows as fit.

    `asked`: that context and no other. Raises ExportError when it does not fit, with the plan.
    """
    left = device.usable - needs.fixed
    most = max(0, left - needs.row) // max(1, needs.token)
    context = wanted if asked else min(wanted, most // 64 * 64)
    if context > most or context < min(wanted, LEAST_CONTEXT):
        plan = DevicePlan(device, needs, wanted if asked else min(wanted, LEAST_CONTEXT), 1)
        advice = f"--context {most // 64 * 64}, " if asked and most >= LEAST_CONTEXT else ""
        raise ExportError(
            f"the model does not fit on {device.name}: {plan}; try {advice}--quantize int4, or another model."
        )
    rows = max(1, min(ROWS, left // max(1, context * needs.token + needs.row)))
    return DevicePlan(device, needs, context, rows)


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
