"""Scales of rounded matrices: 16 bits each in the file, whatever the activations have.

Operators want them in the type of the activations; for fp32 they lie in the file as bf16, which has its range, and ONNX
Runtime casts them once, when it opens the graph.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch

from fmedge_converters.graph import DecoderGraph
from fmedge_converters.weight import Weight


def scale_dtype(dtype: np.dtype[np.generic]) -> np.dtype[np.generic]:
    """In which the scales of a matrix that is read as `dtype` are stored: 16 bits."""
    return np.dtype(np.float16) if dtype == np.float16 else np.dtype(ml_dtypes.bfloat16)


def torch_scale_dtype(dtype: np.dtype[np.generic]) -> torch.dtype:
    """The same for torch."""
    return torch.float16 if scale_dtype(dtype) == np.float16 else torch.bfloat16


def add_scales(graph: DecoderGraph, name: str, scales: Weight, dtype: np.dtype[np.generic]) -> ir.Value:
    """An initializer for scales, and what casts it, once, to the type of the activations."""
    stored = graph.add_weight(name, scales)
    if scales.dtype == dtype:
        return stored
    for user, _ in stored.uses():
        if user.op_type == "Cast":
            return user.outputs[0]
    wide = ir.DataType.from_numpy(dtype)
    (cast,) = graph.insert(graph.graph[0], "Cast", (stored,), [(wide, stored.shape)], {"to": int(wide)})
    return cast
