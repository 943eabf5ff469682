"""A checkpoint in several files: which they are, and that they belong together."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from fmedge_runtimes.errors import SourceError

from fmedge_converters.stored import StoredTensor

POINTER = b"version https://git-lfs.github.com/spec/"
"""How the small file begins that Git LFS leaves where it has not fetched the large one."""


def refuse_pointer(file: Path) -> None:
    """Raise SourceError when a file is a pointer of Git LFS, or cannot be read at all."""
    try:
        with file.open("rb") as opened:
            start = opened.read(len(POINTER))
    except OSError as error:
        raise SourceError(f"cannot read {file}: {error.strerror}.") from error
    if start == POINTER:
        raise SourceError(f"{file} is a pointer of Git LFS, not the weights; run `git lfs pull` in {file.parent}.")


def indexed_files(index: Path) -> tuple[Path, ...]:
    """The shards that an index names.

    Raises SourceError: the index is damaged, a shard is missing.
    """
    refuse_pointer(index)
    try:
        shards = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        files = tuple(index.parent / shard for shard in shards)
    except (ValueError, KeyError, AttributeError, TypeError, OSError) as error:
        raise SourceError(f"{index} is not an index of shards ({error}); copy it again.") from error
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise SourceError(
            f"{index.parent} lacks {len(missing)} of its {len(files)} shards, {missing[0]} first; "
            "download or copy the folder again."
        )
    if not files:
        raise SourceError(f"{index} names no shards; copy it again.")
    return files


def add_tensors(tensors: dict[str, StoredTensor], found: Iterable[StoredTensor]) -> None:
    """Add the tensors of a shard to those of the others. Raises SourceError when it contradicts them."""
    for tensor in found:
        other = tensors.setdefault(tensor.name, tensor)
        if other is not tensor and not _same(other, tensor):
            raise SourceError(
                f"{other.file} and {tensor.file.name} both hold {tensor.name}, with different values: shards of two "
                "checkpoints are mixed; download or copy the folder again."
            )


def _same(first: StoredTensor, second: StoredTensor) -> bool:
    rows = first.shape[0] if first.shape else 1
    alike = (first.shape, first.dtype) == (second.shape, second.dtype)
    return alike and torch.equal(first.read(0, rows), second.read(0, rows))
