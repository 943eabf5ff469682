"""A folder that another exporter wrote: what its configuration files say of the decoder in it.

Such a folder has no manifest, no checksums and no evidence. Each exporter's files are read by a file of its own
(genai_folder.py, optimum_folder.py); whether the decoder can run is decided by its graph's inputs and outputs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from fmedge_runtimes.errors import BundleError, BundleFormatError
from fmedge_runtimes.foreign_session import GraphNames
from fmedge_runtimes.manifest import SamplingFacts

TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class ForeignFolder:
    """A decoder of another exporter, before its graph is opened."""

    folder: Path
    exporter: str
    graph: Path
    names: GraphNames
    in_place: bool
    """The caches are updated in place; otherwise they grow."""
    device: str
    """Where it runs unless told otherwise."""
    architecture: str
    context: int
    vocabulary: int
    head_size: int | None
    """For caches whose graph leaves their last axis open."""
    windows: Mapping[int, int]
    """Window of each layer whose cache holds no more than that."""
    eos_token_ids: tuple[int, ...]
    sampling: SamplingFacts


class Settings(BaseModel):
    """The part of a configuration file that matters here; whatever else it holds is the exporter's business."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class GenerationSettings(Settings):
    """Recommended sampling, as generation_config.json and the search of genai_config.json both spell it."""

    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def sampling(self) -> SamplingFacts:
        """The recommended sampling; what is left unsaid counts as transformers' default."""
        penalty = self.repetition_penalty or 1.0
        if not self.do_sample:
            return SamplingFacts(repetition_penalty=penalty)
        return SamplingFacts(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=max(0, 50 if self.top_k is None else self.top_k),
            top_p=self.top_p or 1.0,
            min_p=self.min_p or 0.0,
            repetition_penalty=penalty,
        )


Read = TypeVar("Read", bound=Settings)


def read_json(path: Path) -> dict[str, Any]:
    """A configuration file. Raises BundleError when it cannot be read, BundleFormatError when it is no JSON object."""
    try:
        raw = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, nested too deep
        raise BundleFormatError(f"{path} is not JSON ({error}); copy or export the folder again.") from error
    if not isinstance(raw, dict):
        raise BundleFormatError(f"{path} holds no JSON object; copy or export the folder again.")
    return raw


def settings(path: Path, raw: Mapping[str, Any], kind: type[Read]) -> Read:
    """The settings in the content of a configuration file. Raises BundleFormatError, which names what is missing."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        words = "is missing" if first["type"] == "missing" else f"is wrong: {first['msg']}"
        raise BundleFormatError(f"{path}: {where} {words}; fmedge cannot run this decoder without it.") from error


def inside(folder: Path, name: str, source: Path) -> Path:
    """The path of a file that a configuration file names. Raises BundleFormatError when it leaves the folder."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise BundleFormatError(f"{source}: the file name {name!r} leaves the folder; do not trust this folder.")
    return path


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """End-of-sequence ids, of which there may be none, one or several."""
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)


def special_tokens(folder: Path) -> dict[str, str]:
    """bos_token, eos_token, ... as the tokenizer's configuration spells them, for the chat template."""
    found = {}
    for name in ("special_tokens_map.json", TOKENIZER_CONFIG):
        raw = read_json(folder / name) if (folder / name).is_file() else {}
        for key in SPECIAL_TOKENS:
            value = raw.get(key)
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str):
                found[key] = content
    return found


def chat_template_file(folder: Path) -> str | None:
    """The file that holds the chat template; older exporters keep it in the tokenizer's configuration."""
    if (folder / "chat_template.jinja").is_file():
        return "chat_template.jinja"
    path = folder / TOKENIZER_CONFIG
    return TOKENIZER_CONFIG if path.is_file() and read_json(path).get("chat_template") else None
