"""Safetensors: one file, or shards with an index. A tensor is read by rows, without the rest of its file."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import torch
from fmedge_runtimes.errors import SourceError
from safetensors import SafetensorError, safe_open

from fmedge_converters.containers.shards import add_tensors, indexed_files, refuse_pointer
from fmedge_converters.stored import Container, StoredTensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


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


def open_files(files: Sequence[Path], stack: ExitStack) -> dict[str, StoredTensor]:
    """Every tensor of the files by its name, from the headers alone.

    Raises SourceError: a file is truncated or is not safetensors, or two files hold different tensors of one name.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        refuse_pointer(file)
        try:
            reader = stack.enter_context(safe_open(file, framework="pt"))
            found = [_stored(file, name, reader.get_slice(name)) for name in reader.keys()]  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise SourceError(
                f"{file} is damaged or is not safetensors ({error}); download or copy it again."
            ) from error
        add_tensors(tensors, found)
    return tensors


class _Slice(Protocol):
    """What safetensors hands out for a tensor."""

    def get_shape(self) -> list[int]: ...
    def get_dtype(self) -> str: ...
    def __getitem__(self, rows: object) -> torch.Tensor: ...


def _stored(file: Path, name: str, part: _Slice) -> StoredTensor:
    shape = tuple(part.get_shape())

    def read(start: int, stop: int) -> torch.Tensor:
        try:
            return part[start:stop] if shape else part[...]
        except (SafetensorError, OSError) as error:
            raise SourceError(f"{file}: cannot read {name} ({error}); download or copy it again.") from error

    return StoredTensor(file, name, shape, part.get_dtype(), read)


SAFETENSORS = Container("safetensors", SINGLE, find, open_files)
