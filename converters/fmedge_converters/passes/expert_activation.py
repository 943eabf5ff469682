"""What stands between the two products of an expert, as kernels for whole mixtures name it.

Models spell their activations in many ways. What was traced between the products is run on samples and compared with
the forms that kernels know; the constants of the traced code are the candidates for a form's parameters.
SwiGLU: https://arxiv.org/abs/2002.05202.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from fmedge_converters.graph import DecoderGraph, constant, dims
from fmedge_converters.weight import Array

SCALES = (0.1, 1.0, 3.0, 30.0)
"""Of the rows of samples: small ones tell curvatures apart, large ones limits."""
PLAIN = {
    "identity": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x * _sigmoid(x),
}


@dataclass(frozen=True, slots=True)
class Activation:
    """A form that kernels know. For "swiglu", with gate g and linear part l cut off at the limit:
    g * sigmoid(alpha * g) * (l + beta), where g <= limit and -limit <= l <= limit."""

    name: str
    interleaved: bool = False
    """The gate has the even rows of the first product; else it has the first half of them."""
    alpha: float = 1.0
    beta: float = 0.0
    limit: float | None = None

    @property
    def gated(self) -> bool:
        """Whether the first product has a gate and a linear part."""
        return self.name == "swiglu"

    def __call__(self, x: Array) -> Array:
        """The activation of [R, N]: [R, N], or [R, N / 2] if it is gated."""
        if not self.gated:
            return np.asarray(PLAIN[self.name](x))
        half = x.shape[-1] // 2
        gate, linear = (x[:, 0::2], x[:, 1::2]) if self.interleaved else (x[:, :half], x[:, half:])
        if self.limit is not None:
            gate, linear = np.minimum(gate, self.limit), np.clip(linear, -self.limit, self.limit)
        return np.asarray(gate * _sigmoid(self.alpha * gate) * (linear + self.beta))


def _sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-np.clip(x, -500, 500))))


def activation_between(graph: DecoderGraph, first: ir.Value, second: ir.Value) -> Activation | None:
    """The form of what computes `second` [R, I] from `first` [R, N]; None if it is none of those, or needs more."""
    shape, dtype = dims(first), first.dtype
    if shape is None or dtype is None or not isinstance(shape[-1], int):
        return None
    try:
        part = ir.convenience.extract(graph.graph, inputs=[first], outputs=[second])
    except ValueError:
        # It depends on another input.
        return None
    constants = [constant(value) for value in part.initializers.values()]
    if any(array is None for array in constants):
        return None
    sizes = np.repeat(SCALES, 2)[:, None]  # [R, 1]
    samples = np.random.default_rng(0).standard_normal((len(sizes), shape[-1])) * sizes
    samples = samples.astype(dtype.numpy())  # [R, N]
    evaluator = ReferenceEvaluator(ir.to_proto(ir.Model(part, ir_version=graph.model.ir_version)))
    with np.errstate(all="ignore"):
        (found,) = (np.asarray(array) for array in evaluator.run(None, {str(first.name): samples}))
    scalars = {float(array.reshape(())) for array in constants if array is not None and array.size == 1}
    epsilon = np.finfo(samples.dtype).eps
    exact = samples.astype(np.float64)
    for form in _forms(shape[-1], found.shape[-1], scalars):
        wanted = form(exact)
        # Rounding of the result, and of what it is the product of.
        bound = epsilon * (16 * np.abs(wanted) + 4 * sizes**2)
        if (np.abs(wanted - found) <= bound).all():
            return form
    return None


def _forms(size: int, result: int, scalars: set[float]) -> Iterator[Activation]:
    if size == result:
        yield from (Activation(name) for name in PLAIN)
    if size == 2 * result:
        limits = (None, *sorted(scalar for scalar in scalars if scalar > 0))
        for interleaved, alpha, beta, limit in itertools.product(
            (False, True), sorted({1.0, *scalars}), sorted({0.0, *scalars}), limits
        ):
            yield Activation("swiglu", interleaved, alpha, beta, limit)
