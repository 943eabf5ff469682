"""What comes before training: the data read, checked, split and tokenized into the work folder."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmedge_runtimes.errors import TrainingError

from fmedge.training.corpus import Corpus, documents_from_sources, split_documents
from fmedge.training.presets import Preset, llama_config_from_preset, preset_named
from fmedge.training.progress import Progress, Report
from fmedge.training.python_text import python_documents
from fmedge.training.run_options import deciding_options
from fmedge.training.tokenizer import TextTokenizer, read_tokenizer, tokens_from_documents, train_tokenizer
from fmedge.training.workfolder import WorkFolder

if TYPE_CHECKING:
    from fmedge.training.text import TextTraining


@dataclass(frozen=True, slots=True)
class Preparation:
    """What is settled before training; run.json holds it."""

    options: dict[str, Any]
    """Those that decide the result."""
    config: dict[str, Any]
    pad: int
    sequence_length: int
    batch: int
    learning_rate: float
    vocabulary: int
    train_documents: int
    train_tokens: int
    validation_documents: int
    validation_tokens: int
    validation_bytes: int
    sha256: str
    """Of the text and its split."""


def prepare(options: TextTraining, work: WorkFolder, report: Report) -> None:
    """Settle the model, read and check the data, and write its tokens into the work folder."""
    preset = preset_named(options.preset)
    config = llama_config_from_preset(preset) if options.config is None else _read_config(options.config)
    sequence_length = _sequence_length(options, preset, config)
    report(Progress("reading"))
    documents = documents_from_sources(options.data, field=options.field) if options.data else python_documents()
    corpus = split_documents(documents)
    report(Progress("tokenizing"))
    text_tokenizer = _tokenizer(options, preset, config, corpus)
    train = tokens_from_documents(text_tokenizer, corpus.train)
    validation = tokens_from_documents(text_tokenizer, corpus.validation)
    preparation = Preparation(
        options=deciding_options(options),
        config={
            "vocab_size": text_tokenizer.vocabulary,
            **config,
            "bos_token_id": text_tokenizer.bos,
            "eos_token_id": text_tokenizer.eos,
            "pad_token_id": None,  # Llama freezes the embedding of this token; see _write_model.
        },
        pad=text_tokenizer.pad,
        sequence_length=sequence_length,
        batch=options.batch or preset.batch,
        learning_rate=options.learning_rate or preset.learning_rate,
        vocabulary=text_tokenizer.vocabulary,
        train_documents=len(corpus.train),
        train_tokens=len(train),
        validation_documents=len(corpus.validation),
        validation_tokens=len(validation),
        validation_bytes=corpus.validation_bytes,
        sha256=corpus.sha256,
    )
    work.write_preparation(
        dataclasses.asdict(preparation), text_tokenizer.files, {"train": train, "validation": validation}
    )


def _tokenizer(options: TextTraining, preset: Preset, config: dict[str, Any], corpus: Corpus) -> TextTokenizer:
    if options.tokenizer is None:
        return train_tokenizer(corpus.train, config.get("vocab_size", preset.vocabulary))
    text_tokenizer = read_tokenizer(options.tokenizer)
    if config.get("vocab_size", math.inf) < text_tokenizer.vocabulary:
        raise TrainingError(
            f"{options.config}: its vocab_size of {config['vocab_size']} is less than the "
            f"{text_tokenizer.vocabulary} tokens of {options.tokenizer}"
        )
    return text_tokenizer


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise TrainingError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise TrainingError(f"{file}: is not JSON: {error}") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise TrainingError(f'{file}: a transformers config is a JSON object with a "model_type", such as "llama"')
    from fmedge.training.pretraining import checked_config

    complete = checked_config(config, str(file))
    if "vocab_size" not in config:
        complete.pop("vocab_size", None)  # The architecture's default is another model's vocabulary.
    return complete


def _sequence_length(options: TextTraining, preset: Preset, config: dict[str, Any]) -> int:
    context = config.get("max_position_embeddings")
    if context is None:  # Not every architecture has a limit.
        return options.sequence_length or preset.sequence_length
    if options.sequence_length is not None and options.sequence_length > context:
        raise TrainingError(
            f"--sequence-length {options.sequence_length} is more than the model's context of {context}"
        )
    return options.sequence_length or min(preset.sequence_length, context)
