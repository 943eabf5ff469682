"""Constraints on the text: JSON Schema, regular expression or grammar, as the tokens that may come next.

    constraints = Constraints(tokenizer, vocabulary=32000)
    constraint = constraints.compile(Sampling(regex="[0-9]+"))
    scores += constraint.limits()         # [V]: 0 where a token may come, -inf elsewhere
    constraint.advance(token)

llguidance does the parsing. It comes with the extra `constraints` and is imported when the first request needs it.
What a token is for the grammar is exactly what it adds to the text of a completion (`Tokenizer.text_bytes`), so a text
that ends where the grammar accepts is one that the grammar accepts.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

from fmedge_runtimes.errors import RequestError
from fmedge_runtimes.sampling import ConstraintKind, Sampling
from fmedge_runtimes.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
    from llguidance._lib import JsonCompileOptions

_KEPT = 64
"""Compiled constraints that are kept for requests to come; compiling a large schema takes a second."""

_WHITESPACE: JsonCompileOptions = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,40}"}
"""Between the parts of a JSON text. Without a bound a weak model may go on with spaces for ever.

A schema that brings llguidance's own key `x-guidance` says for itself.
"""

_END = b"<|fmedge:end|>"
"""The name of the token that stands for the end of the text; no vocabulary has it."""

_PIECE = 32
"""Bytes of the longest token that is looked for where the tokenizer itself does not spell what is prescribed."""

_NEVER = 1 << 20
"""What a token that cannot be chosen costs."""

_EXTRA = 257
"""Tokens that the grammar knows behind the vocabulary: the end, and one for each byte that may be missing."""

_LIMITS = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"),
    np.float32(0),
    np.float32(-np.inf),
)  # [256, 8]: what the bits of a byte say about eight tokens


class Constraint:
    """What the text of one completion may go on with."""

    def __init__(self, matcher: LLMatcher, vocabulary: int) -> None:
        """For `matcher`, the token behind the vocabulary stands for the end of the text."""
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._words = np.zeros((1, (vocabulary + _EXTRA + 31) // 32), np.int32)  # [1, bits / 32]
        self.accepts = False
        """Whether the text may end here."""
        self.complete = False
        """Whether it can only end here."""
        self.error: str | None = None
        """Why no token is allowed although the text may not end here."""
        self._look()

    def limits(self) -> npt.NDArray[np.float32]:
        """0 for tokens [V] that may come next, -inf for all others."""
        limits: npt.NDArray[np.float32] = _LIMITS.take(self._words.view(np.uint8)[0], axis=0).reshape(-1)
        return limits[: self._vocabulary]

    def advance(self, token: int) -> None:
        """Take the next token of the text. One that may not come makes an error, and nothing may follow it."""
        if not self._matcher.consume_token(token):
            self.error = _first_line(self._matcher.get_error())
        self._look()

    def _look(self) -> None:
        from llguidance.numpy import fill_next_token_bitmask

        fill_next_token_bitmask(self._matcher, self._words)
        if self._matcher.is_error():
            self.error = self.error or _first_line(self._matcher.get_error())
            self._words[:] = 0
        word, bit = divmod(self._vocabulary, 32)
        self.accepts = bool(int(self._words[0, word]) >> bit & 1)
        self._words[0, word] &= np.int32(2**bit - 1)
        none = not self._words[0, : word + 1].any()
        self.complete = none and self.accepts
        if none and not self.accepts:
            self.error = self.error or "the tokenizer has no token for what has to come next"


class Constraints:
    """Compiles the constraints of requests to one model. May be called from several threads."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int) -> None:
        """`vocabulary` is the size of the logits; ids that the tokenizer lacks never come."""
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._parser_tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[tuple[ConstraintKind, str], LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, sampling: Sampling) -> Constraint | None:
        """The constraint of a request before its first token; None if it has none.

        Raises RequestError when the schema, expression or grammar is not understood, allows no text but the empty one,
        or contradicts forced_tokens; and when llguidance is not installed.
        """
        if sampling.constraint is None:
            return None
        with self._lock:
            matcher = self._matcher(*sampling.constraint)
            constraint = Constraint(matcher.deep_copy(), self._vocabulary)
            fitting = matcher.validate_tokens(list(sampling.forced_tokens))
        if constraint.error is not None:
            raise RequestError(f"Sampling.{sampling.constraint[0]}: {constraint.error}")
        if constraint.complete:
            raise RequestError(f"Sampling.{sampling.constraint[0]} allows no text but the empty one.")
        if fitting < len(sampling.forced_tokens):
            raise RequestError(
                f"Sampling.forced_tokens do not fit {sampling.constraint[0]}: token {fitting} of them, "
                f"id {sampling.forced_tokens[fitting]}, cannot come there."
            )
        return constraint

    def _matcher(self, kind: ConstraintKind, source: str) -> LLMatcher:
        found = self._compiled.get((kind, source))
        if found is None:
            found = self._build(kind, source)
            self._compiled[kind, source] = found
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end((kind, source))
        return found

    def _build(self, kind: ConstraintKind, source: str) -> LLMatcher:
        try:
            from llguidance import LLMatcher, LLParserLimits, grammar_from
        except ImportError as error:
            raise RequestError(
                f"Sampling.{kind} needs llguidance, which this environment lacks: pip install 'fmedge[constraints]'."
            ) from error
        if self._parser_tokenizer is None:
            self._parser_tokenizer = _parser_tokenizer(self._tokenizer, self._vocabulary)
        try:
            if kind == "json_schema":
                schema = json.loads(source)
                plain = isinstance(schema, dict) and "x-guidance" not in schema
                grammar = LLMatcher.grammar_from_json_schema(source, defaults=_WHITESPACE if plain else None)
            else:
                grammar = grammar_from(kind, source)
        except ValueError as error:
            raise RequestError(f"Sampling.{kind}: {error}.") from error
        limits = LLParserLimits(verbose_errors=False)
        matcher = LLMatcher(self._parser_tokenizer, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise RequestError(f"Sampling.{kind}: {matcher.get_error()}")
        return matcher


class _Vocabulary:
    """The tokens as llguidance asks for them (its TokenizerWrapper): those of the model, the end, and missing bytes.

    Of what a grammar prescribes llguidance allows the tokens that the call gives, so these must be exactly its bytes.
    A byte that no token spells gets a token of its own behind the vocabulary, which can never be chosen.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        self._tokenizer = tokenizer
        special = {token: name.encode() for token, name in tokenizer.special_tokens().items() if token < size}
        texts = tokenizer.text_bytes(size)
        missing = [bytes([byte]) for byte in range(256)]
        known = set(texts)
        self.tokens = [special.get(token, text) for token, text in enumerate(texts)]
        # As many for every tokenizer: those that are not missing have no bytes, and never come.
        self.tokens += [_END, *(b"" if byte in known else byte for byte in missing)]
        self.eos_token_id = size
        self.special_token_ids = [*special, size]
        self._size = size
        self._ids: dict[bytes, int] = {}
        for token, text in enumerate(self.tokens):
            if text and token != size and token not in special:
                self._ids.setdefault(text, token)

    def __call__(self, text: str | bytes) -> list[int]:
        wanted = text.encode() if isinstance(text, str) else bytes(text)
        # SentencePiece begins a text with a space, which a line break before the text takes on itself.
        return self._encoded(b"", wanted) or self._encoded(b"\n", wanted) or self._spell(wanted)

    def _encoded(self, before: bytes, wanted: bytes) -> list[int]:
        """The tokenizer's own tokens of a text behind another one, if they have its bytes; none otherwise."""
        try:
            tokens = self._tokenizer.encode((before + wanted).decode("utf-8", "replace"), special=False)
        except RequestError:
            return []
        texts = [self.tokens[token] if token < self._size else b"" for token in tokens]
        skipped = 0
        while skipped < len(texts) and b"".join(texts[:skipped]).lstrip(b" ") != before:
            skipped += 1
        # Special tokens are spelt here, but have no text: they are not among the ids by text.
        plain = all(text in self._ids for text in texts[skipped:])
        return tokens[skipped:] if plain and b"".join(texts[skipped:]) == wanted else []

    def _spell(self, wanted: bytes) -> list[int]:
        """The fewest tokens for some bytes, those of missing bytes only where nothing else is left."""
        ways: list[tuple[int, int, int]] = [(0, 0, 0)]  # what it costs up to each place, where the last token began, it
        for end in range(1, len(wanted) + 1):
            found = [
                (ways[start][0] + (1 if token < self._size else _NEVER), start, token)
                for start in range(max(0, end - _PIECE), end)
                if (token := self._ids.get(wanted[start:end])) is not None
            ]
            ways.append(min(found))
        tokens, end = [], len(wanted)
        while end > 0:
            _, end, token = ways[end]
            tokens.append(token)
        return tokens[::-1]


def _parser_tokenizer(tokenizer: Tokenizer, vocabulary: int) -> LLTokenizer:
    from llguidance import LLTokenizer

    tokens = _Vocabulary(tokenizer, vocabulary)
    # Its stub names a class; what it takes is any object with these members.
    return LLTokenizer(cast("TokenizerWrapper", tokens), n_vocab=len(tokens.tokens), eos_token=tokens.eos_token_id)


def _first_line(message: str) -> str:
    return message.split("\n", 1)[0]
