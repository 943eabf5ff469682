"""Where prompts come from: arguments, a text file with one on each line, JSON lines, or standard input."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from fmedge_runtimes.errors import RequestError
from fmedge_runtimes.sampling import Sampling, checked

LineId = str | int
"""What names a prompt to whoever wrote it."""


@dataclass(frozen=True, slots=True)
class LineFields:
    """What a line of JSON may say beside its prompt and id."""

    options: frozenset[str]
    """Options for that prompt alone."""
    checked: Callable[[Mapping[str, Any]], dict[str, Any]]
    """The values of such options in their normal form; raises RequestError for one that cannot be."""
    messages: bool
    """Whether there may be a conversation instead of a prompt."""


SAMPLING = LineFields(frozenset(item.name for item in fields(Sampling)), checked, messages=True)
"""For models that write text."""


@dataclass(frozen=True, slots=True)
class PromptLine:
    """One prompt: text, token ids, or the messages of a conversation."""

    prompt: str | list[int] | None
    messages: list[dict[str, Any]] | None
    overrides: dict[str, Any]
    """Options for this prompt alone."""
    where: str = ""
    """File and line of a prompt that has overrides."""
    number: int = 0
    """Of its line in the file, from 1."""
    id: LineId | None = None
    """That the line gives; it comes back with the result."""

    def sampling(self, base: Sampling) -> Sampling:
        """The options of this prompt. Raises RequestError, naming file and line, when they contradict each other."""
        try:
            return replace(base, **self.overrides)
        except RequestError as error:
            raise RequestError(f"{self.where}: {error}") from error


def read_prompts(arguments: Sequence[str], source: str | None, known: LineFields = SAMPLING) -> list[PromptLine]:
    """All prompts, those of the arguments first.

    A .jsonl file (or JSON lines on standard input) gives {"prompt": text or ids} or {"messages": [...]} on each line,
    an "id" if wanted, and options for that prompt alone. Raises RequestError naming file and line.
    """
    lines = [PromptLine(argument, None, {}) for argument in arguments]
    if source is not None:
        lines += _read_source(source, known)
    if not lines:
        raise RequestError("there is no prompt; give one as an argument, or --input FILE, or --input - for stdin.")
    return lines


def _read_source(source: str, known: LineFields) -> list[PromptLine]:
    try:
        raw = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    except OSError as error:
        raise RequestError(f"cannot read {source}: {error.strerror}.") from error
    text = decoded(source, raw)
    rows = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    as_json = source.endswith(".jsonl") or (source == "-" and bool(rows) and rows[0][1].lstrip().startswith("{"))
    return [parse_line(f"{source}:{number}", number, line, known, as_json=as_json) for number, line in rows]


def decoded(where: str, raw: bytes) -> str:
    """Bytes as text. Raises RequestError, naming the place, if they are none."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{where} is not UTF-8 text (byte {error.start}).") from error


def parse_line(where: str, number: int, line: str, known: LineFields = SAMPLING, *, as_json: bool) -> PromptLine:
    """The prompt of a line that is not blank: the line itself, or what its JSON says.

    Raises RequestError, naming the place.
    """
    if not as_json:
        return PromptLine(line.rstrip("\r\n"), None, {}, where, number)
    return _from_json(where, number, line, known)


def _from_json(where: str, number: int, line: str, known: LineFields) -> PromptLine:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where} is not JSON ({error}).") from error
    if isinstance(record, str):
        return PromptLine(record, None, {}, where, number)
    if not isinstance(record, dict):
        raise RequestError(f'{where} must be an object like {{"prompt": "..."}}.')
    prompt = record.pop("prompt", None)
    messages = record.pop("messages", None) if known.messages else None
    identity = record.pop("id", None)
    if identity is not None and (isinstance(identity, bool) or not isinstance(identity, str | int)):
        raise RequestError(f'{where}: "id" must be a string or a whole number.')
    if (prompt is None) == (messages is None):
        wanted = 'either "prompt" or "messages"' if known.messages else '"prompt"'
        raise RequestError(f"{where} needs {wanted}.")
    ids = isinstance(prompt, list) and all(isinstance(token, int) for token in prompt)
    if prompt is not None and not isinstance(prompt, str) and not ids:
        raise RequestError(f'{where}: "prompt" must be a text or a list of token ids.')
    if messages is not None and not (isinstance(messages, list) and all(isinstance(item, dict) for item in messages)):
        raise RequestError(f'{where}: "messages" must be a list of objects with role and content.')
    unknown = sorted(set(record) - known.options)
    if unknown:
        first = ("id", "prompt", "messages") if known.messages else ("id", "prompt")
        raise RequestError(
            f"{where} has the unknown key {unknown[0]!r}; known are {', '.join((*first, *sorted(known.options)))}."
        )
    try:
        return PromptLine(prompt, messages, known.checked(record), where, number, identity)
    except RequestError as error:
        raise RequestError(f"{where}: {error}") from error
