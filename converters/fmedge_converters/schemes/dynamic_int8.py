"""W8A8 on the CPU: int8 weights with a scale for each output channel, activations quantized in every call.

DynamicQuantizeMatMul takes int8 weights [K, N]; uint8 weights miss its fast kernel. It quantizes all rows of a call
with one scale, so rows of a batch influence each other's rounding; docs/quantization.md has what that costs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import torch

from fmedge_converters.graph import MICROSOFT, DecoderGraph, replace
from fmedge_converters.passes.linear import Linear
from fmedge_converters.passes.lookup import Lookup
from fmedge_converters.schemes.qmoe import qmoe
from fmedge_converters.schemes.scheme import Scheme
from fmedge_converters.weight import Array, Weight, transposed


def quantize_rows(rows: Array) -> tuple[Array, Array]:
    """Quantize rows [n, K] to int8 [n, K] with float32 scales [n] = largest magnitude / 127."""
    values = torch.from_numpy(rows).to(torch.float32)
    scales = values.abs().amax(-1) / 127  # [n]
    inverse = torch.where(scales == 0, 0.0, 1.0 / scales)
    codes = (values * inverse[:, None]).round_().clamp_(-127, 127).to(torch.int8)
    return codes.numpy(), scales.numpy()


class QuantizedRows:
    """Codes and scales of the rows of one weight [N, K]; the scales of rows whose codes were read are kept until they
    are read."""

    def __init__(
        self,
        weight: Weight,
        quantize: Callable[[Array], tuple[Array, Array]] = quantize_rows,
        dtype: np.dtype[np.generic] | None = None,
    ) -> None:
        """`quantize` gives rows [n, K] codes [n, K] of a type, int8 unless said otherwise, and scales [n]."""
        self._weight, self._quantize = weight, quantize
        self._dtype = np.dtype(np.int8) if dtype is None else dtype
        self._kept: dict[tuple[int, int], Array] = {}

    @property
    def codes(self) -> Weight:
        """Codes [N, K]."""
        return Weight(self._weight.shape, self._dtype, self._codes, step=self._weight.rows_at_once)

    @property
    def scales(self) -> Weight:
        """Scales [N]."""
        step = self._weight.rows_at_once
        return Weight(self._weight.shape[:1], np.dtype(np.float32), self._scales, step=step)

    def _codes(self, start: int, stop: int) -> Array:
        codes, self._kept[start, stop] = self._quantize(self._weight.read(start, stop))
        return codes

    def _scales(self, start: int, stop: int) -> Array:
        if (start, stop) not in self._kept:
            self._codes(start, stop)
        return self._kept.pop((start, stop))


def _add_quantized(graph: DecoderGraph, name: str, weight: Weight) -> tuple[ir.Value, ir.Value]:
    """Initializers for codes [K, N] and scales [N]."""
    rows = QuantizedRows(weight)
    codes = graph.add_weight(f"{name}.int8.codes", transposed(rows.codes))
    return codes, graph.add_weight(f"{name}.int8.scales", rows.scales)


def spell_linear(graph: DecoderGraph, linear: Linear, *, is_head: bool, block_size: int) -> None:
    """DynamicQuantizeMatMul(x, codes [K, N], scales [N], no zero point, bias)."""
    del is_head, block_size
    codes, scales = _add_quantized(graph, linear.name, graph.weights[linear.name])
    inputs: list[ir.Value | None] = [linear.x, codes, scales]
    if linear.bias is not None:
        inputs += [None, linear.bias]
    like = [(linear.output.dtype, linear.output.shape)]
    (product,) = graph.insert(linear.node, "DynamicQuantizeMatMul", inputs, like, domain=MICROSOFT)
    replace(linear.output, product)


def spell_embedding(graph: DecoderGraph, embedding: Lookup, *, tied: bool, block_size: int) -> None:
    """Columns of the head's codes times their scales when tied, so that the matrix is stored once."""
    del block_size
    weight = graph.weights[str(embedding.weight.name)]
    if not tied:
        _gather_rows(graph, embedding, weight)
        return
    codes, scales = _add_quantized(graph, str(embedding.weight.name), weight)
    batch, length, size = list(embedding.output.shape or ())
    before, ids = embedding.node, embedding.ids
    (columns,) = graph.insert(before, "Gather", (codes, ids), [(ir.DataType.INT8, [size, batch, length])], {"axis": 1})
    like = (embedding.output.dtype, embedding.output.shape)
    (rows,) = graph.insert(before, "Transpose", (columns,), [(ir.DataType.INT8, like[1])], {"perm": [1, 2, 0]})
    _scale(graph, embedding, rows, scales)


def _gather_rows(graph: DecoderGraph, embedding: Lookup, weight: Weight) -> None:
    """Rows of int8 codes [V, E] times their scales."""
    name = f"{embedding.weight.name}.rows.int8"
    quantized = QuantizedRows(weight)
    codes = graph.add_weight(f"{name}.codes", quantized.codes)
    scales = graph.add_weight(f"{name}.scales", quantized.scales)
    like = (ir.DataType.INT8, embedding.output.shape)
    (rows,) = graph.insert(embedding.node, "Gather", (codes, embedding.ids), [like], {"axis": 0})
    _scale(graph, embedding, rows, scales)


def _scale(graph: DecoderGraph, embedding: Lookup, rows: ir.Value, scales: ir.Value) -> None:
    """Rows [B, S, E] in int8 times scales [V] at the token ids."""
    before = embedding.node
    batch, length, _ = list(embedding.output.shape or ())
    floating, shape = ir.DataType.FLOAT, embedding.output.shape
    (numbers,) = graph.insert(before, "Cast", (rows,), [(floating, shape)], {"to": int(floating)})
    (picked,) = graph.insert(before, "Gather", (scales, embedding.ids), [(floating, [batch, length])], {"axis": 0})
    last = graph.add_constant("axis.-1", np.array([-1], np.int64))
    (column,) = graph.insert(before, "Unsqueeze", (picked, last), [(floating, [batch, length, 1])])
    (scaled,) = graph.insert(before, "Mul", (numbers, column), [(floating, shape)])
    replace(embedding.output, scaled)


DYNAMIC_INT8 = Scheme(
    "int8",
    "W8A8: int8 weights per channel, activations quantized in every call",
    8,
    spell_linear,
    spell_embedding,
    block_size=0,
    mixture=qmoe(bits=8),
)
