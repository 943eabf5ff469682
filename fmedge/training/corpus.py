"""The documents of a training run: read from files, folders or standard input, and split.

A text file is one document, or several with the line `<|endoftext|>` between them. A .jsonl file
holds one document a line, in one field of a JSON object. Everything is checked here, before
anything is trained: a file that is empty, binary or not UTF-8 is an error that names the file.
All documents are held in memory.

    documents = documents_from_sources(("notes/", "extra.jsonl"), field="text")
    corpus = split_documents(documents)
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fmedge_runtimes.errors import DataError

END_OF_TEXT = "<|endoftext|>"
"""Separates documents inside a text file, and is the end token of the tokenizers trained here."""

STDIN = "-"
FOLDER_SUFFIXES = (".jsonl", ".md", ".txt")
"""What is read from a folder. A file that is named outright is read whatever its suffix."""

VALIDATION_SHARE = 0.05
VALIDATION_BYTES = 1_000_000
"""More text than this no longer changes the perplexity's first three digits, only the wait for it."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents to train on, and documents held out to measure with."""

    train: tuple[str, ...]
    validation: tuple[str, ...]

    @property
    def validation_bytes(self) -> int:
        """How much text is held out, in UTF-8."""
        return sum(map(_size, self.validation))

    @property
    def sha256(self) -> str:
        """Identifies the text and its split."""
        digest = hashlib.sha256()
        for part in (self.train, self.validation):
            for document in part:
                data = document.encode()
                digest.update(f"{len(data)}:".encode())
                digest.update(data)
            digest.update(b"|")
        return digest.hexdigest()


def documents_from_sources(sources: tuple[str, ...], *, field: str) -> list[str]:
    """Read every document of files, folders and standard input ("-"), in the order given."""
    documents: list[str] = []
    for source in sources:
        if source == STDIN:
            documents += _documents_from_bytes(sys.stdin.buffer.read(), "standard input")
        elif Path(source).is_dir():
            documents += _documents_from_folder(Path(source), field)
        else:
            documents += _documents_from_file(Path(source), field)
    return documents


def split_documents(documents: list[str]) -> Corpus:
    """Hold out about 5 % of the text; the same documents give the same split, whatever their order.

    Whole documents are held out, in the order of their hash, as long as they fit. Where they give
    less than half of what is wanted, as in a single long file, the end of the longest document is
    held out as well.
    """
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise DataError("the data holds no text: give files with text to --data")
    wanted = min(int(sum(map(_size, documents)) * VALIDATION_SHARE), VALIDATION_BYTES)
    left = wanted
    held_out: set[int] = set()
    for index in sorted(range(len(documents)), key=lambda index: _digest(documents[index])):
        size = _size(documents[index])
        if size <= left:
            held_out.add(index)
            left -= size
    train = [text for index, text in enumerate(documents) if index not in held_out]
    validation = [text for index, text in enumerate(documents) if index in held_out]
    if left > wanted / 2 or not validation:
        longest = max(range(len(train)), key=lambda index: len(train[index]))
        train[longest], tail = _cut(train[longest], left)
        validation.append(tail)
    return Corpus(train=tuple(train), validation=tuple(validation))


def _documents_from_folder(folder: Path, field: str) -> list[str]:
    documents: list[str] = []
    paths = list(_paths(folder))
    if not paths:
        raise DataError(f"{folder}: the folder holds no {', '.join(FOLDER_SUFFIXES)} file: name the files")
    for path in paths:
        if path.stat().st_size:  # An empty file among others adds nothing and hides nothing.
            documents += _documents_from_file(path, field)
    if not documents:
        raise DataError(f"{folder}: every file of the folder is empty")
    return documents


def _paths(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.endswith(FOLDER_SUFFIXES) and not name.startswith("."):
                yield Path(root, name)


def _documents_from_file(path: Path, field: str) -> list[str]:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file or folder") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if path.suffix == ".jsonl":
        return _documents_from_jsonl(data, path, field)
    return _documents_from_bytes(data, str(path))


def _documents_from_jsonl(data: bytes, path: Path, field: str) -> list[str]:
    documents: list[str] = []
    for number, line in enumerate(_text(data, str(path)).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, line {number}: not JSON: {error.msg} (column {error.colno}); "
                "a .jsonl file has one JSON object a line"
            ) from error
        if not isinstance(record, dict):
            raise DataError(f"{path}, line {number}: a JSON object is needed, not {type(record).__name__}")
        if field not in record:
            fields = ", ".join(sorted(record)) or "none"
            raise DataError(f'{path}, line {number}: no field "{field}": name the field with --field (here: {fields})')
        if not isinstance(record[field], str):
            kind = type(record[field]).__name__
            raise DataError(f'{path}, line {number}: the field "{field}" must be a string, not {kind}')
        documents += _split_at_end_of_text(record[field])
    if not documents:
        raise DataError(f"{path}: the file holds no text")
    return documents


def _documents_from_bytes(data: bytes, name: str) -> list[str]:
    documents = _split_at_end_of_text(_text(data, name))
    if not documents:
        raise DataError(f"{name}: holds no text" if data else f"{name}: is empty")
    return documents


def _split_at_end_of_text(text: str) -> list[str]:
    parts = text.split(END_OF_TEXT)
    if len(parts) > 1:  # The newlines around a separator belong to the separator.
        parts = [part.strip("\n") for part in parts]
    return [part for part in parts if part.strip()]


def _text(data: bytes, name: str) -> str:
    zero = data.find(b"\0")
    if zero >= 0:
        raise DataError(f"{name}: is binary (a zero byte at offset {zero}): give UTF-8 text")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name}: is not UTF-8 (byte 0x{data[error.start]:02x} at offset {error.start}): convert it to UTF-8 first"
        ) from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _cut(document: str, size: int) -> tuple[str, str]:
    """Cut about `size` bytes off the end, at a paragraph, a line or a word, whichever is found first."""
    start = len(document) - max(len(document) * size // _size(document), 1)
    for boundary in ("\n\n", "\n", " "):
        found = document.rfind(boundary, len(document) // 2, start)
        if found > 0:
            start = found + len(boundary)
            break
    return document[:start], document[start:]


def _size(document: str) -> int:
    return len(document.encode())


def _digest(document: str) -> bytes:
    return hashlib.sha256(document.encode()).digest()
