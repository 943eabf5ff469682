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
from fmedge_runtimes.errors import SourceError

from fmedge_converters.decoder import quiet_libraries
from fmedge_converters.pipeline_source import PartSource
from fmedge_converters.tokenizer_files import TOKENIZER, compare_tokenizers

TABLE = "alphas_cumprod.npy"
TOKENIZER_CONFIG = "tokenizer_config.json"
INSTRUCTION = "tokenizer/instruction.txt"
"""What SANA's pipeline puts in front of every prompt, up to its last character."""
KEPT_OF_TOKENIZER = ("vocab.json", "merges.txt", "special_tokens_map.json", "spiece.model", "tokenizer.model")
"""Slow forms, which the runtime does not read, but other programs do."""


def write_part_files(part: PartSource, output: Path) -> None:
    """Write the folder of a part that is no module. Raises SourceError."""
    folder = output / part.name
    folder.mkdir()
    if (part.folder / "scheduler_config.json").is_file():
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


def _write_scheduler(part: PartSource, folder: Path) -> None:
    shutil.copyfile(part.folder / "scheduler_config.json", folder / "scheduler_config.json")
    try:
        with quiet_libraries():
            scheduler = part.kind.from_config(part.settings)
    except Exception as error:
        raise SourceError(
            f"{part.folder / 'scheduler_config.json'}: {part.kind.__name__} cannot be built from it: {error}"
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
