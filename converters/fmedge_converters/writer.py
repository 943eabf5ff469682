"""Write a graph and its weights to disk, block by block.

`model.onnx` holds the graph, `model.onnx.data` the initializers as external data. Weights are read, converted and
quantized when their turn comes, a block of rows on each processor, while blocks before them are on their way to the
disk. Equal tensors share their bytes (a head and an embedding that are tied), also those of two graphs in a folder.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common

from fmedge_converters.graph import DecoderGraph
from fmedge_converters.weight import WORKERS, Weight, weight_from_array

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
    """Of its own file."""
    data_sha256: str
    places: Mapping[tuple[int, bytes], int] = field(repr=False)
    """Where tensors lie in the file, by their size and SHA-256."""


def write_graph(
    graph: DecoderGraph,
    folder: Path,
    stem: str,
    progress: Callable[[int, int], None],
    beside: WrittenGraph | None = None,
) -> WrittenGraph:
    """Write the graph as `stem`.onnx and `stem`.onnx.data; `progress` gets bytes done and in all.

    Tensors that the file of `beside`, a graph in the same folder, has already are read from there.

    Raises OSError when the disk is full.
    """
    graph_path, data_path = folder / f"{stem}.onnx", folder / f"{stem}.onnx.data"
    initializers = list(graph.graph.initializers.values())
    total = sum(value.const_value.nbytes for value in initializers if value.const_value is not None)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    with _data_file(data_path, {} if beside is None else beside.places) as data:
        for value in initializers:
            tensor = value.const_value
            if tensor is None:
                raise RuntimeError(f"initializer {value.name} has no value")
            if tensor.nbytes <= INLINE_BYTES:
                value.const_value = ir.tensor(np.asarray(tensor.numpy(), order="C"), name=value.name)
                continue
            weight = graph.weight(value) or weight_from_array(np.ascontiguousarray(tensor.numpy()))
            place = data.place(weight, advance)
            file = data_path if place.own or beside is None else beside.data
            value.const_value = ir.ExternalTensor(
                file.name,
                place.offset,
                weight.nbytes,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=str(value.name),
                base_dir=folder,
            )
    # Traces carry the exporter's file names and line numbers, which are nobody's business on the device.
    common.ClearMetadataAndDocStringPass()(graph.model)
    graph_path.write_bytes(ir.to_proto(graph.model).SerializeToString())
    return WrittenGraph(graph_path, data_path, data.size, data.digest.hexdigest(), data.places)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor begins."""

    offset: int
    own: bool
    """In this file, not in the other graph's."""


class _DataFile:
    """A file that grows by tensors. `others`: those that another file has."""

    def __init__(self, file: BinaryIO, others: Mapping[tuple[int, bytes], int]) -> None:
        self.size = 0
        self.digest = hashlib.sha256()
        self.places: dict[tuple[int, bytes], int] = {}
        self._file = file
        self._others = others
        self._offsets: dict[object, _Place] = {}

    def place(self, weight: Weight, advance: Callable[[int], None]) -> _Place:
        """Where a weight's bytes are, which are written unless they are there already; `advance` counts them."""
        if weight.identity in self._offsets:
            advance(weight.nbytes)
            return self._offsets[weight.identity]
        contents = _contents(weight)
        first = next(contents)
        # Two tensors that begin alike are compared before one is left out.
        beginning = (weight.nbytes, hashlib.sha256(first).digest())
        place = self._offsets.get(beginning)
        if place is not None and place.own and self._holds(weight, place.offset):
            advance(weight.nbytes)
        else:
            place = self._write(weight.nbytes, chain([first], contents), advance)
        self._offsets[weight.identity] = self._offsets[beginning] = place
        return place

    def _write(self, nbytes: int, contents: Iterator[memoryview], advance: Callable[[int], None]) -> _Place:
        """Append a tensor; what the other file turns out to have is taken back."""
        size, digest, own = self.size, self.digest.copy(), hashlib.sha256()
        self._append(b"\0" * (-size % ALIGNMENT))
        offset = self.size
        for content in contents:
            self._append(content)
            own.update(content)
            advance(len(content))
        key = nbytes, own.digest()
        if key in self._others:
            self._file.seek(size)
            self._file.truncate()
            self.size, self.digest = size, digest
            return _Place(self._others[key], own=False)
        self.places[key] = offset
        return _Place(offset, own=True)

    def _append(self, content: bytes | memoryview) -> None:
        self._file.write(content)
        self.digest.update(content)
        self.size += len(content)

    def _holds(self, weight: Weight, offset: int) -> bool:
        """Whether the file has a weight's bytes at an offset."""
        self._file.seek(offset)
        try:
            return all(self._file.read(len(content)) == content for content in _contents(weight))
        finally:
            self._file.seek(0, os.SEEK_END)


@contextmanager
def _data_file(path: Path, others: Mapping[tuple[int, bytes], int]) -> Iterator[_DataFile]:
    threads = torch.get_num_threads()
    # Blocks side by side instead of operations in pieces, whose threads would wait for each other.
    torch.set_num_threads(1)
    try:
        with path.open("w+b") as file:
            yield _DataFile(file, others)
    finally:
        torch.set_num_threads(threads)


def _contents(weight: Weight) -> Iterator[memoryview]:
    """The bytes of a weight, block by block."""
    return (np.ascontiguousarray(block).reshape(-1).view(np.uint8).data for block in weight.blocks(WORKERS))
