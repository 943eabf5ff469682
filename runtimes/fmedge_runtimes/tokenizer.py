"""Text to token ids and back, and back while the tokens are still coming. It knows nothing of models.

tokenizer = Tokenizer(Path("tokenizer.json"))
stream = TextStream(tokenizer, stop=("\\n\\n",))
pieces = [stream.push(token) for token in tokens] + [stream.flush()]
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers

from fmedge_runtimes.errors import BundleDamagedError, RequestError


class Tokenizer:
    """A tokenizer.json, opened."""

    def __init__(self, path: Path) -> None:
        """Raises BundleDamagedError when the file is missing or is not a tokenizer."""
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more specific
            raise BundleDamagedError(
                f"{path} cannot be read as a tokenizer ({error}); copy or export the bundle again."
            ) from error
        # Left over from training, and of no use here: a prompt must come through as it is.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._size = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {token: facts.content for token, facts in added.items() if facts.special}
        decoder = self._tokenizer.decoder
        self._stages = _stages(json.loads(decoder.__getstate__())) if decoder is not None else []
        self._by_bytes = [stage["type"] for stage in self._stages] == ["ByteLevel"]
        self._before: list[int] | None = None

    @property
    def vocab_size(self) -> int:
        """All ids of the tokenizer are below this."""
        return self._size

    @property
    def base_size(self) -> int:
        """The number of tokens without those that were added to the tokenizer's own vocabulary."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=False))

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text, with the special tokens around it that the tokenizer adds (BOS, ...).

        special=False adds none: a rendered chat template brings its own. Raises RequestError.
        """
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=special).ids)
        except Exception as error:  # the library raises nothing more specific
            raise RequestError(f"the prompt cannot be tokenized ({error}); it must be valid Unicode.") from error

    def encode_with_bytes(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids of a text without special tokens around it, and for how many of its UTF-8 bytes each one stands.

        What a normalizer drops in front of a token counts as the token's. Raises RequestError.
        """
        try:
            found = self._tokenizer.encode(text, add_special_tokens=False)
            points = np.frombuffer(text.encode("utf-32-le"), np.uint32)  # [C]
        except Exception as error:  # the library raises nothing more specific
            raise RequestError(f"the text cannot be tokenized ({error}); it must be valid Unicode.") from error
        sizes = 1 + (points > 0x7F) + (points > 0x7FF) + (points > 0xFFFF).astype(np.int64)  # [C]
        before = np.concatenate([[0], np.cumsum(sizes)])  # [C + 1]
        ends = np.maximum.accumulate(before[[end for _, end in found.offsets]]) if found.ids else before[:0]  # [S]
        return list(found.ids), np.diff(ends, prepend=0).tolist()

    def prefix(self) -> list[int]:
        """The special tokens (BOS, ...) that the tokenizer puts before a text."""
        bare = self.encode("a", special=False)
        whole = self.encode("a")
        starts = (start for start in range(len(whole)) if whole[start : start + len(bare)] == bare)
        return whole[: next(starts, 0)]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids without special tokens. Raises RequestError for an id that cannot be one.

        Ids from vocab_size on have no text: models pad their logits beyond the tokenizer, so they can be generated.
        """
        for token in tokens:
            _check(token)
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)

    def token_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it; None if it has none such."""
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def special_tokens(self) -> dict[int, str]:
        """The special tokens, which have no text, and how they are spelt."""
        return {token: self._special[token] for token in sorted(self._special)}

    def text_bytes(self, size: int) -> list[bytes]:
        """What each id below `size` adds to a text that goes on, in UTF-8 bytes; special tokens and padding add none.

        Raises RequestError when that depends on the tokens around it.
        """
        if not self._by_bytes and not _is_local(self._stages):
            raise RequestError(
                "constraints need tokens that have a text of their own; the decoder of this tokenizer "
                f"({', '.join(stage['type'] for stage in self._stages) or 'none'}) makes it from several."
            )
        texts = [b""] * size
        pieces = [(token, piece) for token in range(min(size, self._size)) if (piece := self._piece(token)) is not None]
        if self._by_bytes:
            for token, piece in pieces:
                texts[token] = _bytes_of(piece)
            return texts
        falls_back = any(stage["type"] == "ByteFallback" for stage in self._stages)
        before = self._word()
        skipped = len(self._tokenizer.decode(before, skip_special_tokens=False))
        decoded = self._tokenizer.decode_batch([[*before, token] for token, _ in pieces], skip_special_tokens=False)
        for (token, piece), text in zip(pieces, decoded, strict=True):
            byte = _byte_token(piece) if falls_back else None
            texts[token] = text[skipped:].encode() if byte is None else bytes([byte])
        return texts

    def _word(self) -> list[int]:
        """A token that shows when it stands alone, so that decoders take what follows it for the middle of a text."""
        if self._before is None:
            shown = (
                [token]
                for token in range(self._size)
                if (piece := self._piece(token)) is not None and _byte_token(piece) is None
                if self._tokenizer.decode([token], skip_special_tokens=False).strip()
            )
            self._before = next(shown, [])
        return self._before

    def _piece(self, token: int) -> str | None:
        """How the vocabulary spells a token; None for a special token, or one that pads the vocabulary."""
        _check(token)
        return None if token in self._special else self._tokenizer.id_to_token(token)

    def _text_source(self, *, continues: bool) -> _TextSource:
        if self._by_bytes:
            return _ByteText()
        local = _is_local(self._stages)
        return _WindowText(self._tokenizer, local=local, before=self._word() if continues and local else [])


class TextStream:
    """The text of one sequence while its tokens come in. Only what no later token can change is given out.

    The pieces of all `push` and the final `flush` make up decode(all tokens), or, with stop strings, that text up to
    the first place where one of them begins. Costs a constant amount of work per token, however long the text is.

    With `continues` the tokens go on from others that are not given, as a completion does from its prompt: what the
    decoder takes away from the beginning of a text, such as SentencePiece's first space, stays.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, continues: bool = False) -> None:
        self._tokenizer = tokenizer
        self._source = tokenizer._text_source(continues=continues)
        self._stop = tuple(stop)
        self._found = re.compile("|".join(map(re.escape, self._stop)))
        self._longest = max(map(len, self._stop), default=0)
        self._pending = ""
        self._pieces: list[str] = []
        self.stopped = False
        """True once a stop string was found; the stream gives nothing more then."""

    @property
    def text(self) -> str:
        """All text given out so far."""
        return "".join(self._pieces)

    def push(self, token: int) -> str:
        """Take the next token and return the text that is now certain. Raises RequestError as decode does."""
        piece = self._tokenizer._piece(token)
        if self.stopped or piece is None:
            return ""
        return self._give(self._source.push(token, piece), final=False)

    def flush(self) -> str:
        """Return the text held back, at the end of the sequence. A stop string can still be found here."""
        return "" if self.stopped else self._give(self._source.flush(), final=True)

    def _give(self, new: str, *, final: bool) -> str:
        text = self._pending + new
        certain = len(text)
        if self._stop:
            match = self._found.search(text)
            certain = match.start() if match else certain
            # An earlier, still incomplete one goes first: where the text is cut must not depend on token borders.
            begun = None if final else self._begun(text, certain)
            certain = certain if begun is None else begun
            self.stopped = match is not None and begun is None
        text, self._pending = text[:certain], "" if self.stopped else text[certain:]
        if text:
            self._pieces.append(text)
        return text

    def _begun(self, text: str, end: int) -> int | None:
        """Where before `end` a stop string begins that the text breaks off in."""
        for start in range(max(0, len(text) - self._longest + 1), end):
            if any(stop.startswith(text[start:]) for stop in self._stop):
                return start
        return None


def _check(token: int) -> None:
    if not 0 <= token < 2**32:
        raise RequestError(f"{token} is not a token id; ids are whole numbers from 0 on.")


class _TextSource(Protocol):
    """Turns tokens into text that is final."""

    def push(self, token: int, piece: str) -> str: ...
    def flush(self) -> str: ...


class _ByteText:
    """Byte-level BPE (GPT-2, Llama 3, Qwen): each token is bytes, the text is their UTF-8."""

    def __init__(self) -> None:
        # Replaces malformed bytes as Rust's from_utf8_lossy does, one U+FFFD per maximal ill-formed part.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int, piece: str) -> str:
        return self._decoder.decode(_bytes_of(piece))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _WindowText:
    """All other decoders: decodes a window of tokens and gives out what it has more than its beginning.

    The window begins with tokens that are given out already and have a text, so that what decoders do to the first
    token or to the first spaces of a text happens to those. With `local` false nothing is given out before the end.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, *, local: bool, before: list[int]) -> None:
        self._tokenizer = tokenizer
        self._local = local
        self._before = before
        self._since: list[int] = []
        self._shown = len(self._decode(before))

    def push(self, token: int, piece: str) -> str:
        self._since.append(token)
        # ByteFallback replaces a whole run of byte tokens (<0x0A>) if it is not UTF-8, so the run has to end first.
        if not self._local or _byte_token(piece) is not None:
            return ""
        text = self.flush()
        alone = self._decode(self._since)
        if alone:
            self._before, self._since, self._shown = self._since, [], len(alone)
        return text

    def flush(self) -> str:
        if not self._since:
            return ""
        text = self._decode(self._before + self._since)
        new, self._shown = text[self._shown :], len(text)
        return new

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False)


def _stages(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps of a decoder of tokenizer.json, nested sequences resolved."""
    if decoder["type"] == "Sequence":
        return [stage for part in decoder["decoders"] for stage in _stages(part)]
    return [decoder]


def _is_local(stages: Sequence[dict[str, Any]]) -> bool:
    """Whether a token, or a run of byte tokens, decodes to the same text whatever follows it."""
    fused = False
    for stage in stages:
        match stage["type"]:
            case "Fuse":
                fused = True
            case "Replace" if fused:
                # Of the text as a whole; only single characters cannot reach across tokens.
                if len(stage["pattern"].get("String", "")) != 1:
                    return False
            case "Strip":
                # The end of the text is not known before; tokenizers 0.23 panics on texts shorter than this, too.
                if stage["stop"] > 0:
                    return False
            case "Replace":
                pass
            case "ByteFallback" | "Metaspace" | "WordPiece":
                if fused:
                    return False
            case _:
                return False
    return True


def _byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level BPE spells bytes (GPT-2, `bytes_to_unicode`)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    spelt = {chr(byte): byte for byte in plain}
    spelt.update({chr(256 + offset): byte for offset, byte in enumerate(others)})
    return spelt


_BYTE_OF = _byte_alphabet()


def _bytes_of(piece: str) -> bytes:
    """The bytes of a token of byte-level BPE."""
    try:
        return bytes(_BYTE_OF[character] for character in piece)
    except KeyError:
        # An added token is spelt as text, not in the byte alphabet.
        return piece.encode()


def _byte_token(piece: str) -> int | None:
    """The byte that a token of SentencePiece's byte fallback stands for, <0x0A>; None for other tokens."""
    found = _BYTE_TOKEN.fullmatch(piece)
    return int(found[1], 16) if found else None


_BYTE_TOKEN = re.compile("<0x([+0-9A-Fa-f][0-9A-Fa-f])>")
"""With a plus sign, too: Rust's number parser takes it, so the library does."""
