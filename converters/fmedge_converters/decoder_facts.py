"""What the runtime must know of a decoder, from its configuration, its tokenizer and its authors' recommendations."""

from __future__ import annotations

import shutil
from pathlib import Path

from fmedge_runtimes.errors import RequestError, SourceError
from fmedge_runtimes.manifest import SamplingFacts, TextFacts
from fmedge_runtimes.sampling import Sampling
from transformers import GenerationConfig

from fmedge_converters.build import BuiltDecoder
from fmedge_converters.decoder import quiet_libraries, text_config
from fmedge_converters.evidence import text_facts
from fmedge_converters.first_line import first_line
from fmedge_converters.source import Source
from fmedge_converters.tokenizer_files import TokenizerFacts

GENERATION_CONFIG = "generation_config.json"


def decoder_facts(
    source: Source,
    built: BuiltDecoder,
    tokenizer: TokenizerFacts | None,
    generation: GenerationConfig,
    context: int,
) -> TextFacts:
    """The facts of a written decoder. Raises SourceError where configuration and tokenizer contradict each other."""
    eos = generation.eos_token_id
    if eos is None:
        eos = text_config(source.config).eos_token_id
    if eos is None and tokenizer is not None:
        eos = tokenizer.eos_token_id
    ids = () if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,)
    if not all(isinstance(token, int) for token in ids):
        raise SourceError(f"{source.id}: eos_token_id is {eos!r}; it must be a token id, or a list of them.")
    # Added tokens may lie beyond the model (an image's place in a text model); a prompt with one is refused.
    if tokenizer is not None and tokenizer.base_size > built.vocabulary:
        raise SourceError(
            f"{source.id}: its tokenizer has {tokenizer.base_size} tokens but the model knows {built.vocabulary}; "
            "the tokenizer belongs to another model."
        )
    return text_facts(built, context).model_copy(
        update={
            "eos_token_ids": tuple(int(token) for token in ids if 0 <= int(token) < built.vocabulary),
            "special_tokens": tokenizer.special_tokens if tokenizer else {},
            "tokenizer": tokenizer.tokenizer if tokenizer else None,
            "chat_template": tokenizer.chat_template if tokenizer else None,
            "sampling": _sampling(source, generation),
        }
    )


def write_generation_config(source: Source, folder: Path) -> GenerationConfig:
    """Copy generation_config.json, if there is one, and read it. Raises SourceError."""
    if source.files.gguf is not None or not (source.folder / GENERATION_CONFIG).is_file():
        return GenerationConfig()
    try:
        with quiet_libraries():
            generation = GenerationConfig.from_pretrained(source.folder)
    except Exception as error:
        path = source.folder / GENERATION_CONFIG
        raise SourceError(f"{path}: transformers cannot read it: {first_line(error)}") from error
    shutil.copyfile(source.folder / GENERATION_CONFIG, folder / GENERATION_CONFIG)
    return generation


def _sampling(source: Source, generation: GenerationConfig) -> SamplingFacts:
    """The recommended sampling. Raises SourceError when the runtime would refuse it in every request."""
    try:
        facts = _recommended(generation)
        Sampling(**facts.model_dump())
    except (RequestError, TypeError, ValueError) as error:
        raise SourceError(f"{source.folder / GENERATION_CONFIG}: {first_line(error)}") from error
    return facts


def _recommended(generation: GenerationConfig) -> SamplingFacts:
    """What transformers leaves unsaid counts as its own default."""
    penalty = float(generation.repetition_penalty or 1.0)
    if not generation.do_sample:
        return SamplingFacts(repetition_penalty=penalty)
    return SamplingFacts(
        temperature=float(1.0 if generation.temperature is None else generation.temperature),
        top_k=max(0, int(50 if generation.top_k is None else generation.top_k)),
        top_p=float(1.0 if generation.top_p is None else generation.top_p),
        min_p=float(generation.min_p or 0.0),
        repetition_penalty=penalty,
    )
