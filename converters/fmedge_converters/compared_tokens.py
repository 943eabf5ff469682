"""What a bundle is compared on: fixed prompts and a text, as tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fmedge_runtimes.errors import ExportError
from fmedge_runtimes.tokenizer import Tokenizer

from fmedge_converters.builtin_text import builtin_text
from fmedge_converters.evidence import PROMPTS, TEXT_TOKENS
from fmedge_converters.int8_cache import CALIBRATION_TOKENS


@dataclass(frozen=True, slots=True)
class ComparedTokens:
    """What a bundle is compared on."""

    prompts: list[list[int]]
    text: list[int]
    calibration: list[int]
    """What follows the text, for scales; the text itself if it is short."""


def compared_tokens(
    evaluation_text: str, folder: Path, tokenizer_file: str | None, vocabulary: int, context: int
) -> ComparedTokens:
    """Fixed prompts, and a text, as token ids; random ids for a model without a tokenizer."""
    most = TEXT_TOKENS + CALIBRATION_TOKENS
    if tokenizer_file is None:
        random = np.random.default_rng(0)
        draw = [random.integers(0, vocabulary, length).tolist() for length in (1, 17, 5, 30)]
        ids = random.integers(0, vocabulary, most).tolist()
        return ComparedTokens(draw, ids[:TEXT_TOKENS], ids[TEXT_TOKENS:])
    tokenizer = Tokenizer(folder / tokenizer_file)
    longest = max(1, context // 2)
    prompts = [tokenizer.encode(prompt)[:longest] for prompt in PROMPTS]
    ids = tokenizer.encode(evaluation_text)[:most]
    if len(ids) < 2:
        raise ExportError(f"the text of --text gives {len(ids)} tokens; the comparison needs at least 2.")
    text = ids[:TEXT_TOKENS]
    rest = ids[TEXT_TOKENS:]
    return ComparedTokens([prompt for prompt in prompts if prompt], text, rest if len(rest) >= TEXT_TOKENS else text)


def compared_text(path: Path | None) -> str:
    """The text of a file, or Python's own documentation. Raises ExportError."""
    if path is None:
        return builtin_text()
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"cannot read the text {path}: {error}.") from error
