"""Calibration text: documents from files or from Python itself, as rows of token ids.

A text file is one document; a .jsonl file has one on each line, {"text": ...} or {"messages": [...]}, the latter
through the model's chat template. Without files it is Python's own documentation, whose topics come in an order that
depends on their names only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from fmedge_runtimes.chat import ChatTemplate
from fmedge_runtimes.errors import ExportError, RequestError
from fmedge_runtimes.tokenizer import Tokenizer

from fmedge_converters.export_options import LEAST_CALIBRATION, ExportOptions

ROW = 512
"""Tokens of a row, fewer where the model's context is shorter."""
SUFFIXES = (".jsonl", ".md", ".txt")
"""What is read from a folder."""
RUN = 64
"""So many tokens in a row that are those of the comparison's text are the same text."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text, or a conversation."""

    where: str
    text: str = ""
    messages: tuple[dict[str, Any], ...] | None = None


@dataclass(frozen=True, slots=True)
class CalibrationText:
    """Rows of token ids."""

    rows: tuple[tuple[int, ...], ...]
    what: str
    """Where they are from, as evidence says it."""

    @property
    def tokens(self) -> int:
        """Of all rows."""
        return sum(map(len, self.rows))

    @property
    def sha256(self) -> str:
        """Identifies the ids and how they are divided."""
        return hashlib.sha256(json.dumps(self.rows).encode()).hexdigest()


def calibration_text(
    options: ExportOptions,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    context: int,
    compared: Sequence[int],
    compared_text: str,
) -> CalibrationText:
    """The text that an export's options ask for. `compared` are the tokens that its evidence is measured on.

    Raises ExportError: a file cannot be read, holds no text, or holds the text of the evidence; a conversation cannot
    be rendered.
    """
    documents = _of_files(options.calibrate) if options.calibrate else documents_of_python(compared_text)
    documents = _checked(documents, options, template)
    ids: list[int] = []
    known = _runs(compared)
    for document in documents:
        found = _encoded(document, tokenizer, template)
        if not known.isdisjoint(_runs(found)):
            if not options.calibrate:
                continue  # there is enough other text
            raise ExportError(
                f"{document.where} holds the text that the export is compared on, which would look better than it is; "
                "give another --text, or another --calibrate."
            )
        ids += found
        if len(ids) >= options.calibrate_tokens:
            break
    ids = ids[: options.calibrate_tokens]
    if len(ids) < LEAST_CALIBRATION:
        raise ExportError(f"the calibration text gives {len(ids)} tokens; at least {LEAST_CALIBRATION} are needed.")
    length = min(ROW, context)
    rows = tuple(tuple(ids[start : start + length]) for start in range(0, len(ids), length))
    what = " and ".join(Path(source).name for source in options.calibrate) or "Python's documentation"
    return CalibrationText(rows, what)


def documents_of_python(compared: str) -> list[Document]:
    """The topics of Python's documentation that share no paragraph with the text of the evidence."""
    from pydoc_data.topics import topics

    known = set(_paragraphs(compared))
    names = sorted(topics, key=lambda name: hashlib.sha256(name.encode()).digest())
    return [Document(name, topics[name]) for name in names if known.isdisjoint(_paragraphs(topics[name]))]


def _paragraphs(text: str) -> list[str]:
    return [part.strip() for part in text.split("\n\n") if len(part.strip()) > 80]


def _of_files(sources: Sequence[str]) -> list[Document]:
    """The documents of files and folders, taken from each file in turn."""
    files: list[Path] = []
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
            if not found:
                raise ExportError(f"the folder {path} of --calibrate holds no {', '.join(SUFFIXES)} file.")
            files += found
        else:
            files.append(path)
    turns = zip_longest(*(_of_file(file) for file in files))
    return [document for document in chain.from_iterable(turns) if document is not None]


def _of_file(path: Path) -> list[Document]:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"cannot read the calibration text {path}: {error}.") from error
    if path.suffix != ".jsonl":
        return [Document(str(path), text)] if text.strip() else []
    return list(_of_lines(path, text))


def _of_lines(path: Path, text: str) -> Iterator[Document]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ExportError(f"{where} is not JSON ({error}).") from error
        found = record if isinstance(record, dict) else {}
        written, messages = found.get("text"), found.get("messages")
        if isinstance(written, str) and messages is None:
            yield Document(where, written)
        elif written is None and isinstance(messages, list) and all(isinstance(item, dict) for item in messages):
            yield Document(where, messages=tuple(messages))
        else:
            raise ExportError(f'{where} must be an object with "text", or with "messages", a list of messages.')


def _checked(documents: list[Document], options: ExportOptions, template: ChatTemplate | None) -> list[Document]:
    chats = [document for document in documents if document.messages is not None]
    if chats and not options.calibrate_chat:
        raise ExportError(f"{chats[0].where} holds messages; --calibrate-chat puts them through the chat template.")
    if options.calibrate_chat and not chats:
        raise ExportError("--calibrate-chat is for .jsonl files with messages, and --calibrate names none.")
    if chats and template is None:
        raise ExportError("--calibrate-chat needs a chat template, and this model has none.")
    return documents


def _encoded(document: Document, tokenizer: Tokenizer, template: ChatTemplate | None) -> list[int]:
    try:
        if document.messages is None or template is None:
            return tokenizer.encode(document.text)
        return tokenizer.encode(template.render(document.messages, add_generation_prompt=False), special=False)
    except RequestError as error:
        raise ExportError(f"{document.where}: {error}") from error


def _runs(ids: Sequence[int]) -> set[tuple[int, ...]]:
    return {tuple(ids[start : start + RUN]) for start in range(len(ids) - RUN + 1)}
