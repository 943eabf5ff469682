"""Operations of torch that the exporter does not know, written in ONNX."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from onnxscript import opset18 as op


def erf_inv(x: Any) -> Any:  # noqa: ANN401 - a value of onnxscript's tracer
    """The inverse of erf: Winitzki's closed form (A handy approximation for the error function and its inverse, 2008),
    then two steps of Halley's method, which leave the rounding of fp32."""
    a = 0.147
    logarithm = op.Log(op.Sub(1.0, op.Mul(x, x)))
    half = op.Add(2.0 / (math.pi * a), op.Mul(logarithm, 0.5))
    root = op.Sqrt(op.Sub(op.Mul(half, half), op.Div(logarithm, a)))
    y = op.Mul(op.Sign(x), op.Sqrt(op.Sub(root, half)))
    for _ in range(2):
        slope = op.Mul(2.0 / math.sqrt(math.pi), op.Exp(op.Neg(op.Mul(y, y))))
        step = op.Div(op.Sub(op.Erf(y), x), slope)
        y = op.Sub(y, op.Div(step, op.Add(1.0, op.Mul(y, step))))
    return y


TRANSLATIONS: Mapping[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.erfinv.default: erf_inv,
    torch.ops.prims.erf_inv.default: erf_inv,
}
