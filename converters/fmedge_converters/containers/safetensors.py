"""Safetensors: one file, or shards with an index. A tensor is read by rows, without the rest of its file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from fmedge_runtimes.errors import SourceError
from safetensors import SafetensorError, safe_open

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


def indexed_files(index: Path) -> tuple[Path, ...]:
    """The shards that an index names.

    Raises SourceError: the index is damaged, a shard is missing.
    """
    try:
        shards = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError, OSError) as error:
        raise SourceError(f"{index} is not an index of shards ({error}); copy it again.") from error
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise SourceError(
            f"{index.parent} lacks {len(missing)} of its {len(shards)} shards, {missing[0]} first; "
            "download or copy the folder again."
        )
    return tuple(index.parent / shard for shard in shards)


def open_files(files: Sequence[Path], stack: ExitStack) -> dict[str, StoredTensor]:
    """Every tensor of the files by its name, from the headers alone.

    Raises SourceError when a file is truncated or is not safetensors.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        try:
            reader = stack.enter_context(safe_open(file, framework="pt"))
            for name in reader.keys():  # noqa: SIM118 - the reader is not a mapping
                part = reader.get_slice(name)
                tensors[name] = _stored(file, name, part)
        except (SafetensorError, OSError) as error:
            raise SourceError(
                f"{file} is damaged or is not safetensors ({error}); download or copy it again."
            ) from error
    return tensors


def _stored(file: Path, name: str, part: object) -> StoredTensor:
    shape = tuple(part.get_shape())  # type: ignore[attr-defined]

    def read(start: int, stop: int) -> torch.Tensor:
        try:
            tensor: torch.Tensor = part[start:stop] if shape else part[...]  # type: ignore[index]
        except (SafetensorError, OSError) as error:
            raise SourceError(f"{file}: cannot read {name} ({error}); download or copy it again.") from error
        return tensor

    return StoredTensor(file, name, shape, part.get_dtype(), read)  # type: ignore[attr-defined]


SAFETENSORS = Container("safetensors", SINGLE, find, open_files)
