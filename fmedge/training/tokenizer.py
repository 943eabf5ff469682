"""The tokenizer of a training run: a byte-level BPE trained on the text, or one that exists.

Both end as the files that every Hugging Face tool reads, tokenizer.json and tokenizer_config.json.
A trained tokenizer adds nothing to a text and loses nothing of it: decode gives back what encode
was given. Its one special token, `<|endoftext|>`, ends every document, begins a text from nothing
and pads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from fmedge_runtimes.errors import DataError
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fmedge.training.corpus import END_OF_TEXT

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
OTHER_FILES = ("special_tokens_map.json", "chat_template.jinja")
"""What else of a tokenizer's folder belongs to the tokenizer."""

SMALLEST_VOCABULARY = 257
"""The 256 bytes and the end token."""

KNOWN_END_TOKENS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<|im_end|>", "<eos>", "<|eot_id|>")
"""What a tokenizer that comes without tokenizer_config.json may call its end, likeliest first."""

TOKENIZED_TOGETHER = 1000
"""Documents given to the tokenizer at once: enough for every core, few enough to bound the memory."""


@dataclass(frozen=True, slots=True)
class TextTokenizer:
    """A tokenizer, its files to write beside a model, and the ids that the model's config says."""

    tokenizer: Tokenizer
    files: dict[str, bytes]
    eos: int
    bos: int
    pad: int

    @property
    def vocabulary(self) -> int:
        """One more than the largest id, which is what a model's embedding must hold."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def train_tokenizer(documents: Sequence[str], vocabulary: int) -> TextTokenizer:
    """Train a byte-level BPE; a small text may give fewer tokens than asked for."""
    if vocabulary < SMALLEST_VOCABULARY:
        raise DataError(f"a vocabulary of {vocabulary} is too small: byte-level BPE needs {SMALLEST_VOCABULARY}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer, length=len(documents))
    return _with_generated_config(tokenizer, eos=END_OF_TEXT)


def read_tokenizer(path: Path) -> TextTokenizer:
    """Read a tokenizer.json, or the folder that holds one and its config."""
    file = path / TOKENIZER_FILE if path.is_dir() else path
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}: --tokenizer takes a tokenizer.json or its folder") from error
    try:
        tokenizer = Tokenizer.from_buffer(data)
    except Exception as error:  # The package raises bare Exception.
        raise DataError(f"{file}: is not a tokenizer.json: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if not path.is_dir() or not (path / CONFIG_FILE).is_file():
        eos = next((token for token in KNOWN_END_TOKENS if tokenizer.token_to_id(token) is not None), None)
        if eos is None:
            raise DataError(f'{file}: has no known end token: name its "eos_token" in a {CONFIG_FILE} beside it')
        return _with_generated_config(tokenizer, eos)
    config = _read_config(path / CONFIG_FILE)
    eos_id, bos_id, pad_id = (
        _special_id(tokenizer, config, key, path) for key in ("eos_token", "bos_token", "pad_token")
    )
    if eos_id is None:
        raise DataError(f'{path / CONFIG_FILE}: names no "eos_token": a model needs a token that ends a text')
    files = {name: (path / name).read_bytes() for name in OTHER_FILES if (path / name).is_file()}
    return TextTokenizer(
        tokenizer,
        files={TOKENIZER_FILE: data, CONFIG_FILE: (path / CONFIG_FILE).read_bytes(), **files},
        eos=eos_id,
        bos=eos_id if bos_id is None else bos_id,
        pad=eos_id if pad_id is None else pad_id,
    )


def tokens_from_documents(text_tokenizer: TextTokenizer, documents: Sequence[str]) -> NDArray[np.uint32]:
    """Join the documents' tokens, the end token after each."""
    chunks = list(_token_chunks(text_tokenizer, documents))
    return np.concatenate(chunks) if chunks else np.empty(0, np.uint32)  # [N]


def _token_chunks(text_tokenizer: TextTokenizer, documents: Sequence[str]) -> Iterator[NDArray[np.uint32]]:
    end = text_tokenizer.eos
    for start in range(0, len(documents), TOKENIZED_TOGETHER):
        together = list(documents[start : start + TOKENIZED_TOGETHER])
        # Special tokens as at generation: a tokenizer that begins each prompt so must see it trained.
        ids = (encoding.ids for encoding in text_tokenizer.tokenizer.encode_batch_fast(together))
        ended = (row if row and row[-1] == end else [*row, end] for row in ids)
        yield np.fromiter(chain.from_iterable(ended), np.uint32)


def _with_generated_config(tokenizer: Tokenizer, eos: str) -> TextTokenizer:
    config = {
        # The class that transformers 4 and 5 both take for "use tokenizer.json as it is".
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": eos,
        "eos_token": eos,
        "pad_token": eos,
        "clean_up_tokenization_spaces": False,
    }
    end = tokenizer.token_to_id(eos)
    assert end is not None  # The callers looked it up or put it in.
    files = {
        TOKENIZER_FILE: tokenizer.to_str(pretty=True).encode(),
        CONFIG_FILE: (json.dumps(config, indent=2) + "\n").encode(),
    }
    return TextTokenizer(tokenizer, files, eos=end, bos=end, pad=end)


def _read_config(file: Path) -> dict[str, object]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise DataError(f"{file}: a JSON object is needed, not {type(config).__name__}")
    return config


def _special_id(tokenizer: Tokenizer, config: dict[str, object], key: str, folder: Path) -> int | None:
    token = config.get(key)
    if isinstance(token, dict):  # Older files hold the whole AddedToken.
        token = token.get("content")
    if token is None:
        return None
    found: int | None = tokenizer.token_to_id(str(token))
    if found is None:
        raise DataError(f'{folder / CONFIG_FILE}: its {key} "{token}" is not in {TOKENIZER_FILE}')
    return found
