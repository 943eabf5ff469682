"""A text in windows of tokens, read as it is needed: memory does not grow with the text.

tokens = token_stream(read_pieces(Path("text.txt")), tokenizer, most=None)
for window in TextInWindows(tokens, Cut(length=512, stride=256), tokenizer.prefix()).windows():
    window.ids[window.first :]      # the tokens that are scored
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from fmedge_runtimes.errors import DataError

if TYPE_CHECKING:
    from fmedge_runtimes.tokenizer import Tokenizer

STDIN = Path("-")
PIECE = 1 << 20
"""Characters that are tokenized at once; a text is parted where a line begins."""
LINE = re.compile(r"\n(?=\S)")

Token = tuple[int, int]
"""An id, and the bytes of the text that it stands for."""


@dataclass(frozen=True, slots=True)
class Cut:
    """How a text is cut: windows of `length` tokens that begin every `stride` tokens.

    Each window scores what no window before it has scored. With a stride of half the length every token but those of
    the first window has at least half a window of context; with the whole length windows share nothing.
    """

    length: int
    stride: int


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens that go through a model together."""

    ids: list[int]
    """With the tokenizer's special tokens in front of every window."""
    first: int
    """Of the tokens that are scored: ids[first:]."""
    nbytes: int
    """Of the text that is scored."""


def read_pieces(path: Path) -> Iterator[str]:
    """A UTF-8 file, or standard input ("-"), in pieces that end with lines. Raises DataError."""
    try:
        if path == STDIN:
            yield from _pieces(sys.stdin)
        else:
            with path.open(encoding="utf-8") as file:
                yield from _pieces(file)
    except OSError as error:
        raise DataError(f"cannot read the text {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); convert it first.") from error


def _pieces(file: TextIO) -> Iterator[str]:
    rest = ""
    while block := file.read(PIECE):
        if "\0" in block:
            raise DataError(f"{file.name} is binary; give UTF-8 text.")
        rest += block
        ends = [found.end() for found in LINE.finditer(rest)]
        if ends and len(rest) >= PIECE:
            yield rest[: ends[-1]]
            rest = rest[ends[-1] :]
    if rest:
        yield rest


def token_stream(pieces: Iterable[str], tokenizer: Tokenizer, most: int | None) -> Iterator[Token]:
    """The tokens of a text, `most` of them at most."""
    found = (pair for piece in pieces for pair in zip(*tokenizer.encode_with_bytes(piece), strict=True))
    return islice(found, most)


@dataclass(frozen=True, slots=True)
class TextInWindows:
    """A text that is read once."""

    tokens: Iterator[Token]
    cut: Cut
    prefix: Sequence[int]
    """What stands before each window, in addition to its length."""

    def windows(self) -> Iterator[Window]:
        """The windows, in order.

        A token is scored wherever something stands before it: without a prefix, the first one of the text is not, and
        where windows share nothing, neither is the first one of each.
        """
        held: list[Token] = []
        scored = 0
        """How many of those held are scored already."""
        while True:
            held += islice(self.tokens, self.cut.length - len(held))
            first = scored if self.prefix else max(scored, 1)
            if first >= len(held):
                return
            ids = [*self.prefix, *(token for token, _ in held)]
            yield Window(ids, len(self.prefix) + first, sum(nbytes for _, nbytes in held[first:]))
            scored = max(len(held) - self.cut.stride, 0)
            held = held[self.cut.stride :]
