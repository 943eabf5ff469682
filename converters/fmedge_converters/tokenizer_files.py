"""The tokenizer of a source as the runtime needs it: tokenizer.json, the chat template, special tokens.

The runtime tokenizes with `tokenizers` alone, so the file it gets must give the ids that transformers gives; that is
checked on samples before it is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from fmedge_runtimes.chat import ChatTemplate
from fmedge_runtimes.errors import RequestError, SourceError
from transformers import AutoTokenizer

from fmedge_converters.decoder import quiet_libraries
from fmedge_converters.first_line import first_line
from fmedge_converters.gguf_config import has_tokenizer

TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"
SAMPLES = (
    "The quick brown fox jumps over the lazy dog.",
    "  leading spaces, a\ttab,\nnew lines\n\n    and an indent:\n\tdef f(x): return x ** 2  # 1234567890",
    "Größe, naïve, Ελληνικά, русский, 日本語, العربية, emoji 🙂🚀, €½",
    "<s>[INST] not a special token </s> <|endoftext|>",
    " ",
)
FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "tokenizer_config.json",
    "spiece.model",
    "vocab.txt",
)


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """What was written, for the manifest."""

    tokenizer: str
    chat_template: str | None
    special_tokens: dict[str, str]
    base_size: int
    """Tokens without those that were added to the tokenizer's own."""
    eos_token_id: int | None


def write_tokenizer(source: Path, output: Path, gguf: Path | None) -> TokenizerFacts | None:
    """Write the tokenizer of a folder, or of a GGUF file in it, into a bundle; None if the source has no tokenizer.

    Raises SourceError when the tokenizer has no fast form, or its fast form gives other ids, or its chat template is
    no template.
    """
    if gguf is None and not any((source / name).is_file() for name in FILES):
        return None
    if gguf is not None and not has_tokenizer(gguf):
        return None
    options = {} if gguf is None else {"gguf_file": gguf.name}
    try:
        with quiet_libraries():
            tokenizer: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
    except Exception as error:
        raise SourceError(f"{source}: transformers cannot load the tokenizer: {first_line(error)}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise SourceError(
            f"{source}: its tokenizer ({type(tokenizer).__name__}) exists in Python only; the runtime needs a "
            "tokenizer.json that the tokenizers library reads."
        )
    target = output / TOKENIZER
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    # Padding and truncation belong to training; the runtime must see prompts as they are.
    backend.no_padding()
    backend.no_truncation()
    backend.save(str(target))
    compare_tokenizers(source, tokenizer, tokenizers.Tokenizer.from_file(str(target)))
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template:
        _check_template(source, template)
        (output / CHAT_TEMPLATE).write_text(template, "utf-8")
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    base = int(tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=False))
    return TokenizerFacts(TOKENIZER, CHAT_TEMPLATE if template else None, special, base, tokenizer.eos_token_id)


def _check_template(source: Path, template: str) -> None:
    try:
        _ = ChatTemplate(template).takes_tools
    except RequestError as error:
        raise SourceError(f"{source}: {error}") from error


def compare_tokenizers(source: Path, reference: Any, plain: tokenizers.Tokenizer) -> None:  # noqa: ANN401 - transformers' own
    """Raise SourceError when the tokenizers library gives other ids than transformers."""
    for sample in SAMPLES:
        with quiet_libraries():
            wanted: Sequence[int] = reference(sample)["input_ids"]
        found: Sequence[int] = plain.encode(sample).ids
        if list(wanted) != list(found):
            raise SourceError(
                f"{source}: the tokenizers library gives other ids than transformers for {sample!r} "
                f"({list(found)[:8]} instead of {list(wanted)[:8]}); the model would read other text than you wrote."
            )
