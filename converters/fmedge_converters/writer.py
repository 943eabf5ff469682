"""Write a graph and its weights to disk, one tensor at a time.

`model.onnx` holds the graph, `model.onnx.data` the initializers as external data. Weights are read, converted and
quantized when their turn comes, and equal tensors share their bytes (a head and an embedding that are tied).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from fmedge_converters.graph import DecoderGraph
from fmedge_converters.streamed_tensor import StreamedTensor
from fmedge_converters.weight import Array

ALIGNMENT = 64
"""Every tensor starts at a multiple of this, which suits vector loads on a mapped file."""
INLINE_BYTES = 1024
"""Tensors up to this size stay inside model.onnx, where shape inference can see them."""


@dataclass(frozen=True, slots=True)
class WrittenGraph:
    """The files of a graph."""

    graph: Path
    data: Path
    weight_bytes: int


def write_graph(graph: DecoderGraph, folder: Path, stem: str, progress: Callable[[int, int], None]) -> WrittenGraph:
    """Write the graph as `stem`.onnx and `stem`.onnx.data; `progress` gets bytes done and in all.

    Raises OSError when the disk is full.
    """
    graph_path, data_path = folder / f"{stem}.onnx", folder / f"{stem}.onnx.data"
    initializers = list(graph.graph.initializers.values())
    total = sum(value.const_value.nbytes for value in initializers if value.const_value is not None)
    done = 0
    written: dict[tuple[int, bytes], int] = {}
    with data_path.open("wb") as file:
        for value in initializers:
            tensor = value.const_value
            if tensor is None:
                raise RuntimeError(f"initializer {value.name} has no value")
            if tensor.nbytes <= INLINE_BYTES:
                value.const_value = ir.tensor(np.asarray(tensor.numpy(), order="C"), name=value.name)
                continue
            before = file.tell()
            file.write(b"\0" * (-before % ALIGNMENT))
            start, digest = file.tell(), hashlib.sha256()
            for piece in _pieces(tensor):
                content = np.ascontiguousarray(piece).reshape(-1).data.cast("B")
                digest.update(content)
                file.write(content)
                done += len(content)
                progress(done, total)
                del piece, content
            length = file.tell() - start
            offset = written.setdefault((length, digest.digest()), start)
            if offset != start:
                file.seek(before)
                file.truncate()
            value.const_value = ir.ExternalTensor(
                data_path.name,
                offset,
                length,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=str(value.name),
                base_dir=folder,
            )
        size = file.tell()
    # Traces carry the exporter's file names and line numbers, which are nobody's business on the device.
    common.ClearMetadataAndDocStringPass()(graph.model)
    graph_path.write_bytes(ir.to_proto(graph.model).SerializeToString())
    return WrittenGraph(graph_path, data_path, size)


def _pieces(tensor: ir.TensorProtocol) -> Iterator[Array]:
    if isinstance(tensor, StreamedTensor):
        yield from tensor.pieces()
    else:
        yield tensor.numpy()
