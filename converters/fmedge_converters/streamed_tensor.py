"""A tensor of a graph that is made in pieces, so that nobody has to hold it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir

from fmedge_converters.weight import Array


class StreamedTensor(ir.LazyTensor):
    """`pieces` yields it in order, cut along axis 0; what reads it whole joins them."""

    def __init__(
        self,
        pieces: Callable[[], Iterator[Array]],
        dtype: np.dtype[np.generic],
        shape: tuple[int, ...],
        name: str,
    ) -> None:
        super().__init__(
            lambda: ir.tensor(np.concatenate(list(pieces()))),
            dtype=ir.DataType.from_numpy(dtype),
            shape=ir.Shape(shape),
            name=name,
        )
        self.pieces = pieces
