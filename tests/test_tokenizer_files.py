"""Tokenizers as sources bring them, written for the runtime."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece
from fmedge_converters.tokenizer_files import write_tokenizer
from fmedge_runtimes.tokenizer import Tokenizer
from models import TEXT

PROMPTS = ("A small world", "A tuple is immutable", "two spaces and def fib(n)")
BYTES = ("naïve 日本 🙂", "two  spaces, a line\n\tand a tab")


@pytest.mark.parametrize(
    ("model_type", "name", "kind"),
    [("bpe", "tokenizer", "LlamaTokenizer"), ("unigram", "spiece", "T5Tokenizer")],
)
def test_a_sentencepiece_model_without_a_tokenizer_json(model_type: str, name: str, kind: str, tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "output"
    source.mkdir()
    output.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_prefix=str(source / name),
        model_type=model_type,
        vocab_size=340 if model_type == "bpe" else 80,
        byte_fallback=model_type == "bpe",
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (source / "config.json").write_text('{"model_type": "llama"}')
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    facts = write_tokenizer(source, output, None)
    assert facts is not None
    written = Tokenizer(output / facts.tokenizer)
    processor = sentencepiece.SentencePieceProcessor(str(source / f"{name}.model"))
    for prompt in (*PROMPTS, *BYTES) if model_type == "bpe" else PROMPTS:
        ids = written.encode(prompt, special=False)
        assert ids == processor.encode(prompt)
        assert written.decode(ids) == prompt
