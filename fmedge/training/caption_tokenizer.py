"""A tokenizer for captions, of CLIP's form: byte-level BPE over lower-case words, padded with the end token."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, pre_tokenizers, trainers
from transformers import CLIPTokenizer

MOST_WORDS = 8192
LONGEST = 77
"""Tokens of a caption, as in CLIP; the rest of longer ones is cut off."""
START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"


@dataclass(frozen=True, slots=True)
class CaptionTokenizer:
    """A trained tokenizer and what of it the model must know."""

    files: dict[str, bytes]
    """Name and content, as they will stand in the output's tokenizer folder."""
    vocabulary: int
    start: int
    end: int
    length: int
    """Tokens that every caption is padded or cut to."""
    tokens: NDArray[np.int32]
    """Of the captions given, then of the empty caption: [N + 1, length]."""
    cut: int
    """Captions that are longer."""


def train_caption_tokenizer(captions: Sequence[str]) -> CaptionTokenizer:
    """Train on captions; any other text can be written with it, too, byte by byte."""
    vocabulary, merges = _bpe(captions)
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges)
    lengths = [len(ids) for ids in tokenizer(list(captions)).input_ids]
    length = min(max(lengths), LONGEST)
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}
    # After saving: a tokenizer keeps the padding that it was called with.
    padded = tokenizer([*captions, ""], padding="max_length", truncation=True).input_ids
    return CaptionTokenizer(
        files=files,
        vocabulary=len(vocabulary),
        start=vocabulary[START],
        end=vocabulary[END],
        length=length,
        tokens=np.array(padded, dtype=np.int32),
        cut=sum(one > length for one in lengths),
    )


def _bpe(captions: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Learn merges; every byte is in the vocabulary, within a word and at its end."""
    model: Tokenizer = CLIPTokenizer().backend_tokenizer  # It splits text as CLIP does, and knows no word yet.
    trainer = trainers.BpeTrainer(
        vocab_size=MOST_WORDS, min_frequency=2, end_of_word_suffix=WORD_END, show_progress=False
    )
    model.train_from_iterator(captions, trainer)
    merges = [(first, second) for first, second in json.loads(model.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(byte + WORD_END for byte in alphabet), *(first + second for first, second in merges)]
    return {word: number for number, word in enumerate(dict.fromkeys([*words, START, END]))}, merges
