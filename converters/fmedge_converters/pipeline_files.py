"""What of a pipeline is no graph: tokenizers in their fast form, schedulers with their tables, processors, configs."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import tokenizers
import transformers
from fmedge_runtimes.errors import BundleError, SourceError
from fmedge_runtimes.schedulers import parse_config

from fmedge_converters.decoder import quiet_libraries
from fmedge_converters.pipeline_source import PartSource
from fmedge_converters.tokenizer_files import TOKENIZER, compare_tokenizers

TABLE = "alphas_cumprod.npy"
TOKENIZER_CONFIG = "tokenizer_config.json"
SCHEDULER_CONFIG = "scheduler_config.json"
VOCABULARIES = (TOKENIZER, "vocab.json", "spiece.model", "tokenizer.model")
INSTRUCTION = "tokenizer/instruction.txt"
"""What SANA's pipeline puts in front of every prompt, up to its last character."""
KEPT_OF_TOKENIZER = ("vocab.json", "merges.txt", "special_tokens_map.json", "spiece.model", "tokenizer.model")
"""Slow forms, which the runtime does not read, but other programs do."""


def check_part_files(part: PartSource) -> None:
    """Raise SourceError for a scheduler that the runtime has not, and for a tokenizer without a vocabulary."""
    if (part.folder / SCHEDULER_CONFIG).is_file():
        try:
            parse_config(_settings(part), str(part.folder / SCHEDULER_CONFIG))
        except BundleError as error:
            raise SourceError(str(error)) from error
    elif issubclass(part.kind, transformers.PreTrainedTokenizerBase):
        # Without one, transformers makes an empty tokenizer, which encodes every prompt to the same ids.
        if not any((part.folder / name).is_file() for name in VOCABULARIES):
            raise SourceError(f"{part.folder} has none of {', '.join(VOCABULARIES)}; download or copy it again.")
    elif not part.is_module and issubclass(part.kind, diffusers.SchedulerMixin):
        raise SourceError(f"{part.folder / SCHEDULER_CONFIG} is missing; download or copy the folder again.")


def write_part_files(part: PartSource, output: Path) -> None:
    """Write the folder of a part that is no module. Raises SourceError."""
    folder = output / part.name
    folder.mkdir()
    if (part.folder / SCHEDULER_CONFIG).is_file():
        _write_scheduler(part, folder)
    elif issubclass(part.kind, transformers.PreTrainedTokenizerBase):
        _write_tokenizer(part, folder)
    else:
        for path in sorted(part.folder.glob("*.json")):
            shutil.copyfile(path, folder / path.name)


def write_instruction(pipeline: str, output: Path) -> None:
    """Write what a pipeline's class puts in front of every prompt, if it does."""
    with quiet_libraries():
        kind = getattr(diffusers, pipeline, None)
    parameters = {} if kind is None else inspect.signature(kind.__call__).parameters
    if "complex_human_instruction" in parameters:
        lines = parameters["complex_human_instruction"].default or []
        (output / INSTRUCTION).write_text("\n".join(lines), "utf-8")


def _settings(part: PartSource) -> dict[str, Any]:
    """A scheduler's settings, with the class that the pipeline's index names: which is the one that diffusers opens."""
    return {**part.settings, "_class_name": part.kind.__name__}


def _write_scheduler(part: PartSource, folder: Path) -> None:
    settings = _settings(part)
    if settings == part.settings:
        shutil.copyfile(part.folder / SCHEDULER_CONFIG, folder / SCHEDULER_CONFIG)
    else:
        (folder / SCHEDULER_CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", "utf-8")
    try:
        with quiet_libraries():
            scheduler = part.kind.from_config(part.settings)
    except Exception as error:
        raise SourceError(
            f"{part.folder / SCHEDULER_CONFIG}: {part.kind.__name__} cannot be built from it: {error}"
        ) from error
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is not None:
        np.save(folder / TABLE, table.float().numpy())  # [T]


def _write_tokenizer(part: PartSource, folder: Path) -> None:
    try:
        with quiet_libraries():
            tokenizer: Any = part.kind.from_pretrained(part.folder)
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SourceError(f"{part.folder}: transformers cannot load the tokenizer: {first}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise SourceError(
            f"{part.folder}: its tokenizer ({part.kind.__name__}) exists in Python only; the runtime needs a "
            "tokenizer.json that the tokenizers library reads."
        )
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    # The runtime pads and cuts itself.
    backend.no_padding()
    backend.no_truncation()
    backend.save(str(folder / TOKENIZER))
    compare_tokenizers(part.folder, tokenizer, tokenizers.Tokenizer.from_file(str(folder / TOKENIZER)))
    for name in KEPT_OF_TOKENIZER:
        if (part.folder / name).is_file():
            shutil.copyfile(part.folder / name, folder / name)
    if isinstance(tokenizer, transformers.CLIPTokenizer) and not (folder / "vocab.json").is_file():
        backend.model.save(str(folder))  # what a transformers before 5 reads
    path = part.folder / TOKENIZER_CONFIG
    config = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    # Older tokenizers keep their special tokens in a file of their own.
    config["pad_token"] = tokenizer.pad_token
    config["model_max_length"] = tokenizer.model_max_length
    config.setdefault("padding_side", tokenizer.padding_side)
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", "utf-8")
