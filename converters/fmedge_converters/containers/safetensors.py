"""Safetensors: one file, or shards with an index. A tensor is read by rows, without the rest of its file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from fmedge_runtimes.errors import SourceError
from safetensors import SafetensorError, safe_open

from fmedge_converters.containers.shards import add_tensors, indexed_files, refuse_pointer
from fmedge_converters.stored import DTYPES, Container, StoredTensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
METADATA = "__metadata__"


def find(folder: Path) -> tuple[Path, ...]:
    """The files, in the order in which transformers looks; empty if there are none.

    Raises SourceError when a shard of the index is missing.
    """
    if (folder / SINGLE).is_file():
        return (folder / SINGLE,)
    index = folder / INDEX
    if not index.is_file():
        return ()
    return indexed_files(index)


def open_files(files: Sequence[Path], _stack: ExitStack) -> dict[str, StoredTensor]:
    """Every tensor of the files by its name, from the headers alone.

    Raises SourceError: a file is truncated or is not safetensors, or two files hold different tensors of one name.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        refuse_pointer(file)
        try:
            # The library checks that the header is sound and that the data lies in the file, without gaps or overlaps.
            with safe_open(file, framework="np"):
                found = _from_header(file)
        except (SafetensorError, OSError) as error:
            raise SourceError(
                f"{file} is damaged or is not safetensors ({error}); download or copy it again."
            ) from error
        add_tensors(tensors, found)
    return tensors


def _from_header(file: Path) -> list[StoredTensor]:
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    start = 8 + length
    return [
        _stored(file, name, facts["dtype"], tuple(facts["shape"]), start + facts["data_offsets"][0])
        for name, facts in header.items()
        if name != METADATA
    ]


def _stored(file: Path, name: str, kind: str, shape: tuple[int, ...], offset: int) -> StoredTensor:
    dtype = DTYPES.get(kind)

    def read(start: int, stop: int) -> torch.Tensor:
        if dtype is None:
            raise SourceError(f"{file}: {name} is stored as {kind}, which fmedge does not read.")
        start, stop, _ = slice(start, stop).indices(shape[0]) if shape else (0, 1, 1)
        row = math.prod(shape[1:]) * dtype.itemsize
        wanted = max(0, stop - start) * row
        try:
            # Read, not mapped: pages of a mapped file would count as this process's memory.
            data = np.fromfile(file, np.uint8, wanted, offset=offset + start * row)
        except OSError as error:
            raise SourceError(f"{file}: cannot read {name} ({error.strerror}).") from error
        if data.size != wanted:
            raise SourceError(f"{file} has become shorter while it was read; copy it again.")
        return torch.from_numpy(data).view(dtype).reshape((stop - start, *shape[1:]) if shape else ())

    return StoredTensor(file, name, shape, kind, read)


SAFETENSORS = Container("safetensors", SINGLE, find, open_files)
