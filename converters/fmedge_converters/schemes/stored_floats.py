"""Weights that lie in the file as 16-bit floats and are computed with as the target's own.

ONNX Runtime casts them once, when it opens the graph: half the bytes on disk and to copy, the speed and the memory of
the target's type.
"""

from __future__ import annotations

import functools

import ml_dtypes
import numpy as np
import onnx_ir as ir
from fmedge_runtimes.errors import ExportError

from fmedge_converters.graph import DecoderGraph, replace
from fmedge_converters.schemes.floating import spell_embedding, spell_linear
from fmedge_converters.schemes.scheme import Scheme
from fmedge_converters.weight import Array, mapped


def store_weights(graph: DecoderGraph, dtype: np.dtype[np.generic]) -> int:
    """Replace every floating weight of two dimensions or more by one in another type and a cast; how many.

    Norms and biases, which are small, stay. Reading a weight raises ExportError if the type does not hold it.
    """
    count = 0
    first = graph.graph[0]
    for name, weight in list(graph.weights.items()):
        if len(weight.shape) < 2 or weight.dtype.kind != "f" or name not in graph.graph.initializers:
            continue
        value = graph.graph.initializers[name]
        stored = graph.add_weight(
            f"{name}.{dtype.name}", mapped(functools.partial(_cast, name, dtype), [weight], dtype)
        )
        like = (value.dtype, value.shape)
        (wide,) = graph.insert(first, "Cast", (stored,), [like], {"to": int(ir.DataType.from_numpy(weight.dtype))})
        replace(value, wide)
        count += 1
    graph.remove_unused()
    return count


def _cast(name: str, dtype: np.dtype[np.generic], array: Array) -> Array:
    with np.errstate(over="ignore"):
        cast: Array = array.astype(dtype)
    if not np.isfinite(cast.astype(np.float32)).all():
        raise ExportError(f"{name} has values that {dtype.name} does not hold; choose --quantize bf16 or none.")
    return cast


FP16 = Scheme("fp16", "weights stored in fp16", 16, spell_linear, spell_embedding, 0, storage=np.dtype(np.float16))
BF16 = Scheme(
    "bf16", "weights stored in bf16", 16, spell_linear, spell_embedding, 0, storage=np.dtype(ml_dtypes.bfloat16)
)
