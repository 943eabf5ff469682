"""The model to export: a local Hugging Face folder, a hub id, or a folder that `fmedge train` wrote.

Knows what can be learned without building the model: where it lies, its configuration, its licence; and refuses what
is no text decoder, needs foreign code, or is quantized in a form that fmedge does not read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmedge_runtimes.errors import SourceError
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fmedge_converters.formats import find_format

HUB_FILES = (
    "*.json",
    "*.model",
    "*.jinja",
    "*.txt",
    "README.md",
    "LICENSE*",
)
"""What is fetched from a hub besides safetensors: never pickles, never code."""
IGNORED_WEIGHTS = ["*/*", "consolidated*"]
"""Safetensors of another layout than transformers'."""


@dataclass(frozen=True, slots=True)
class Source:
    """A model that was found, and what its configuration says."""

    id: str
    """The hub id, or the name of the local folder."""
    revision: str | None
    """The commit of the hub's repository; None for a local folder."""
    folder: Path
    config: PretrainedConfig
    licence: str | None

    @property
    def architecture(self) -> str:
        """The model type, as transformers names it."""
        return str(self.config.model_type)


def open_source(source: str, revision: str | None = None) -> Source:
    """Find a model and read its configuration.

    Raises SourceError when there is no such model, or when it is not a text decoder that fmedge can read.
    """
    folder = Path(source).expanduser()
    commit = None
    if folder.is_dir():
        if revision is not None:
            raise SourceError(f"--revision is for hub ids; {source} is a local folder.")
        name = folder.resolve().name
    elif folder.exists():
        raise SourceError(f"{source} is a file; give the folder that holds config.json.")
    else:
        folder, commit = _from_hub(source, revision)
        name = source
    raw = _raw_config(folder)
    _refuse_unsupported(folder, raw)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # configurations raise what they like, validation errors of their own included
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SourceError(f"{folder / 'config.json'}: transformers cannot read it: {first_line}") from error
    if config.get_text_config(decoder=True) is not config:
        raise SourceError(
            f"{source} ({config.model_type}) wraps a decoder together with other parts (vision, audio); fmedge exports "
            "decoders alone: save its language model as a model of its own."
        )
    return Source(name, commit, folder, config, _licence(folder, raw))


def _from_hub(source: str, revision: str | None) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        # The small files first: most refusals need no weights.
        folder = snapshot_download(source, revision=revision, allow_patterns=list(HUB_FILES))
        raw = _raw_config(Path(folder))
        _refuse_unsupported(Path(folder), raw)
        snapshot_download(
            source, revision=Path(folder).name, allow_patterns=["*.safetensors"], ignore_patterns=IGNORED_WEIGHTS
        )
    except HFValidationError as error:
        raise SourceError(f"{source} is neither a folder that exists nor a hub id like owner/name.") from error
    except GatedRepoError as error:
        raise SourceError(f"{source} is gated: accept its terms on the hub, then run `hf auth login`.") from error
    except RevisionNotFoundError as error:
        raise SourceError(f"{source} has no revision {revision}.") from error
    except RepositoryNotFoundError as error:
        raise SourceError(
            f"{source} is neither a folder that exists nor a model on the hub (a private one needs `hf auth login`)."
        ) from error
    except OSError as error:
        if not isinstance(error, LocalEntryNotFoundError) and error.errno is not None:
            raise SourceError(f"cannot fetch {source}: {error.strerror}.") from error
        raise SourceError(
            f"{source} is not a folder, and the hub cannot be reached to look for it (it is not in the cache either); "
            "check the path or the network."
        ) from error
    # The cache names a snapshot's folder by its commit.
    return Path(folder), Path(folder).name


def _raw_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "model_index.json").is_file():
            raise SourceError(f"{folder} is a diffusers pipeline; this version exports text decoders only.")
        if (folder / "adapter_config.json").is_file():
            raise SourceError(
                f"{folder} is a PEFT adapter, not a model; merge it into its base (merge_and_unload) and save that."
            )
        if (folder / "fmedge.json").is_file():
            raise SourceError(f"{folder} is already a bundle; export the model it was made from.")
        raise SourceError(f"{folder} has no config.json: it is not a Hugging Face model folder.")
    try:
        raw = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}.") from error
    except (UnicodeDecodeError, ValueError) as error:
        raise SourceError(f"{path} is not JSON ({error}).") from error
    if not isinstance(raw, dict) or "model_type" not in raw:
        raise SourceError(f"{path} does not say its model_type: it is not a transformers configuration.")
    return raw


def _refuse_unsupported(folder: Path, raw: dict[str, Any]) -> None:
    kind = raw["model_type"]
    find_format(raw.get("quantization_config") or {})
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if raw.get("auto_map"):
            raise SourceError(
                f"{folder} ({kind}) needs code of its own (auto_map in config.json), which fmedge never runs; "
                "only architectures inside transformers can be exported."
            )
        raise SourceError(
            f"{folder} ({kind}) is not a causal language model of transformers; fmedge exports text decoders."
        )


def _licence(folder: Path, raw: dict[str, Any]) -> str | None:
    if isinstance(raw.get("license"), str):
        return str(raw["license"])
    card = folder / "README.md"
    if not card.is_file():
        return None
    lines = card.read_text("utf-8", errors="replace").splitlines()
    if not lines or lines[0].strip() != "---":
        return None
    for line in lines[1:]:
        if line.strip() == "---":
            return None
        key, _, value = line.partition(":")
        if key.strip() == "license":
            return value.strip() or None
    return None
