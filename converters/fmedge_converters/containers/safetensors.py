"""Safetensors: one file, or shards with an index. A tensor is read by rows, without the rest of its file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from fmedge_runtimes.errors import SourceError
from safetensors import SafetensorError, safe_open

from fmedge_converters.containers.rows import rows_in_file
from fmedge_converters.containers.shards import add_tensors, indexed_files, refuse_pointer
from fmedge_converters.stored import DTYPES, Container, StoredTensor

SINGLE = "model.safetensors"
STEMS = ("model", "diffusion_pytorch_model")
"""How transformers and diffusers name the weights of a model."""
VARIANTS = ("", ".fp32", ".bf16", ".fp16")
"""What diffusers adds for another precision; the first that is there is read."""
METADATA = "__metadata__"


def find(folder: Path) -> tuple[Path, ...]:
    """The files, in the order in which transformers looks; empty if there are none.

    Raises SourceError when a shard of the index is missing.
    """
    for stem in STEMS:
        for variant in VARIANTS:
            single = folder / f"{stem}{variant}.safetensors"
            if single.is_file():
                return (single,)
            for name in (f"{stem}.safetensors.index{variant}.json", f"{stem}{variant}.safetensors.index.json"):
                if (folder / name).is_file():
                    return indexed_files(folder / name)
    return ()


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
    if dtype is not None:
        return StoredTensor(file, name, shape, kind, rows_in_file(file, name, dtype, shape, offset))

    def refuse(_start: int, _stop: int) -> torch.Tensor:
        raise SourceError(f"{file}: {name} is stored as {kind}, which fmedge does not read.")

    return StoredTensor(file, name, shape, kind, refuse)


SAFETENSORS = Container("safetensors", SINGLE, find, open_files)
