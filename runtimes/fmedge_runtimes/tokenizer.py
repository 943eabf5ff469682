"""Text to token ids and back, by the tokenizers library; and back piece by piece while tokens arrive."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tokenizers

from fmedge_runtimes.errors import BundleDamagedError, RequestError

REPLACEMENT = "\ufffd"
"""What a decoder writes for bytes that are no whole character (yet)."""


class Tokenizer:
    """A tokenizer.json. Raises BundleDamagedError when it cannot be read."""

    def __init__(self, path: Path) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises a bare Exception
            raise BundleDamagedError(f"{path} is not a tokenizer ({error}); export the bundle again.") from error
        # These belong to training: a prompt is never cut or padded.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids, with the special tokens (such as a beginning of sequence) that the model expects if `special`."""
        return list(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special tokens. Raises RequestError for ids that no token has."""
        try:
            return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))
        except OverflowError as error:
            raise RequestError(f"a token id is negative or too large ({error}).") from error


class TextStream:
    """The text of one sequence while its tokens arrive.

    Gives out what is certain: no half characters, and nothing that may yet turn out to be a stop string. What it gave,
    plus `flush()`, is the decoded text of all tokens, cut in front of the first stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._window: list[int] = []
        """The last tokens: those already written, which decoders need as context, and those not written yet."""
        self._written = 0
        """How many tokens of the window are written."""
        self._held = ""
        """Text that is decoded and not given out."""
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; returns the text that became certain."""
        if self.stopped:
            return ""
        self._window.append(token)
        before = self._tokenizer.decode(self._window[: self._written])
        after = self._tokenizer.decode(self._window)
        if len(after) <= len(before) or after.endswith(REPLACEMENT) or not after.startswith(before):
            return ""
        # The tokens just written become the context of the next ones.
        self._window = self._window[self._written :]
        self._written = len(self._window)
        return self._give(after[len(before) :], final=False)

    def flush(self) -> str:
        """The end of the text, whatever it is."""
        if self.stopped:
            return ""
        before = self._tokenizer.decode(self._window[: self._written])
        rest = self._tokenizer.decode(self._window)[len(before) :]
        self._window, self._written = [], 0
        return self._give(rest, final=True)

    def _give(self, new: str, *, final: bool) -> str:
        self._held += new
        found = [place for place in (self._held.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.stopped = True
            given, self._held = self._held[: min(found)], ""
        else:
            keep = 0 if final else self._possible_stop()
            cut = len(self._held) - keep
            given, self._held = self._held[:cut], self._held[cut:]
        self.text += given
        return given

    def _possible_stop(self) -> int:
        """Length of the longest end of the held text that a stop string begins with."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stop):
                return size
        return 0
