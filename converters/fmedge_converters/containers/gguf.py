"""GGUF: metadata and tensors in one file.

    "GGUF", version u32, number of tensors u64, of metadata u64
    metadata    key, type u32, value; a list is type u32, length u64, values; a string is length u64, bytes
    tensors     name, number of dimensions u32, dimensions u64 (the last first), type u32, offset u64
    data        at the next multiple of general.alignment; every tensor begins at its offset from there

The header is parsed here, because the `gguf` package makes an object of each token and merge of a vocabulary, hundreds
of thousands, which takes longer than the export of many a model; here the vocabulary is skipped. Types are spelled as
safetensors has them, or as ggml does (Q4_0, Q6_K, ...); rows of those are read as the bytes of their blocks.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import torch
from fmedge_runtimes.errors import SourceError
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from fmedge_converters.containers.rows import rows_in_file
from fmedge_converters.stored import DTYPES, Container, StoredTensor

SUFFIX = ".gguf"
ARCHITECTURE = "general.architecture"
ALIGNMENT = "general.alignment"
PARTS = "split.count"
MAGIC = b"GGUF"
VERSIONS = (2, 3)
NUMBERS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
"""As `struct` spells them."""


@dataclass(frozen=True, slots=True)
class Header:
    """What the beginning of a file says."""

    metadata: Mapping[str, Any]
    """Lists of strings are None."""
    tensors: Mapping[str, StoredTensor]


def read_header(file: Path) -> Header:
    """Metadata and tensors of a file, the tensors unread.

    Raises SourceError: it is damaged, or one part of several.
    """
    try:
        with file.open("rb") as opened, mmap(opened.fileno(), 0, access=ACCESS_READ) as data:
            header = _parse(file, data)
    except (ValueError, struct.error, OverflowError, MemoryError, OSError) as error:
        raise SourceError(f"{file} is damaged or is not GGUF ({error}); download or copy it again.") from error
    parts = header.metadata.get(PARTS)
    if isinstance(parts, int) and parts > 1:
        raise SourceError(
            f"{file} is one of {parts} parts of a model; join them with llama.cpp's llama-gguf-split --merge."
        )
    return header


class _Cursor:
    """A place in a file that moves on as values are read."""

    def __init__(self, data: mmap) -> None:
        self.data = data
        self.place = 0

    def numbers(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{form}", self.data, self.place)
        self.place += struct.calcsize(f"<{form}")
        return values

    def skip_string(self) -> int:
        (length,) = self.numbers("Q")
        self.place += length
        if self.place > len(self.data):
            raise ValueError("a text reaches beyond the end of the file")
        return int(length)

    def string(self) -> str:
        length = self.skip_string()
        return bytes(self.data[self.place - length : self.place]).decode("utf-8")

    def value(self, kind: int) -> Any:  # noqa: ANN401 - a number, a text, or a list of numbers
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind != GGUFValueType.ARRAY:
            return self.numbers(NUMBERS[GGUFValueType(kind)])[0]
        element, count = self.numbers("IQ")
        if element != GGUFValueType.STRING:
            return list(self.numbers(f"{count}{NUMBERS[GGUFValueType(element)]}"))
        for _ in range(count):
            self.skip_string()
        return None


def _parse(file: Path, data: mmap) -> Header:
    cursor = _Cursor(data)
    if data[: len(MAGIC)] != MAGIC:
        raise ValueError("it does not begin with the word GGUF")
    cursor.place = len(MAGIC)
    version, tensors, entries = cursor.numbers("IQQ")
    if version not in VERSIONS:
        raise ValueError(f"version {version} is not one of {VERSIONS}")
    metadata = {}
    for _ in range(entries):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.numbers("I")[0])
    table = []
    for _ in range(tensors):
        name = cursor.string()
        (rank,) = cursor.numbers("I")
        shape = cursor.numbers(f"{rank}Q")[::-1]
        table.append((name, shape, *cursor.numbers("IQ")))
    start = -(-cursor.place // metadata.get(ALIGNMENT, 32)) * metadata.get(ALIGNMENT, 32)
    found = {name: _stored(file, name, shape, kind, start + offset, len(data)) for name, shape, kind, offset in table}
    return Header(metadata, found)


def _stored(file: Path, name: str, shape: tuple[int, ...], code: int, offset: int, size: int) -> StoredTensor:
    kind = GGMLQuantizationType(code)
    numbers, bytes_each = GGML_QUANT_SIZES[kind]
    if shape[-1] % numbers:
        raise ValueError(f"{name} has rows of {shape[-1]}, and {kind.name} packs {numbers} together")
    dtype = DTYPES.get(kind.name)
    rows = shape if dtype is not None else (*shape[:-1], shape[-1] // numbers * bytes_each)
    if offset + math.prod(rows) * (1 if dtype is None else dtype.itemsize) > size:
        raise ValueError(f"{name} reaches beyond its end")
    return StoredTensor(file, name, shape, kind.name, rows_in_file(file, name, dtype or torch.uint8, rows, offset))


def find(path: Path) -> tuple[Path, ...]:
    """The file, if the path is not a folder."""
    return (path,) if path.is_file() else ()


def open_files(files: Sequence[Path], _stack: ExitStack) -> dict[str, StoredTensor]:
    """Every tensor of the files by its name."""
    return {name: tensor for file in files for name, tensor in read_header(file).tensors.items()}


GGUF = Container("GGUF", "*.gguf", find, open_files)
