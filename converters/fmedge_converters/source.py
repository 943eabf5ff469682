"""The model to export: a local Hugging Face folder, a hub id, a folder that `fmedge train` wrote, or a PEFT adapter.

Knows what can be learned without reading weights: where it lies, its configuration, its licence; and refuses what
is no text decoder, needs foreign code, or is quantized in a form that fmedge does not read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fmedge_runtimes.errors import SourceError
from fmedge_runtimes.manifest import MODEL_INDEX
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fmedge_converters.adapter import CONFIG as ADAPTER_CONFIG
from fmedge_converters.adapter import Adapter, read_adapter_config
from fmedge_converters.checkpoint import Files
from fmedge_converters.decoder import empty_model, quiet_libraries
from fmedge_converters.first_line import first_line
from fmedge_converters.formats import find_format
from fmedge_converters.gguf_config import gguf_config, gguf_file, gguf_licence
from fmedge_converters.hub import SMALL_FILES, fetch
from fmedge_converters.wrapper import Wrapper, open_wrapper

IGNORED_WEIGHTS = ["*/*", "consolidated*"]
"""Safetensors of another layout than transformers'."""
PICKLES = ["pytorch_model*.bin", "adapter_model.bin"]
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True, slots=True)
class Source:
    """A model that was found, and what its configuration says."""

    id: str
    """The hub id, or the name of the local folder."""
    revision: str | None
    """The commit of the hub's repository; None for a local folder."""
    files: Files
    config: PretrainedConfig
    licence: str | None
    adapter: str | None = None
    """Hub id or folder name of the adapter that is merged into it."""
    loads_by_itself: bool = True
    """Whether transformers alone loads the same numbers; not with an adapter, nor from every quantized form."""

    @property
    def architecture(self) -> str:
        """The model type, as transformers names it."""
        return str(self.config.model_type)

    @property
    def folder(self) -> Path:
        """Where its configuration and weights lie."""
        return self.files.folder

    @property
    def tokenizer_folder(self) -> Path:
        """Where its tokenizer lies: an adapter that brings one was trained with it."""
        adapter = self.files.adapter
        brings = adapter is not None and any((adapter / name).is_file() for name in TOKENIZERS)
        return adapter if adapter is not None and brings else self.folder

    @property
    def tokenizer_gguf(self) -> Path | None:
        """The GGUF file that holds its tokenizer, if one does."""
        return self.files.gguf if self.tokenizer_folder == self.folder else None


@dataclass(frozen=True, slots=True)
class _Found:
    name: str
    commit: str | None
    folder: Path
    gguf: Path | None = None


@dataclass(frozen=True, slots=True)
class _Facts:
    """What the files of a source say of it."""

    config: PretrainedConfig
    wrapper: Wrapper | None
    licence: str | None
    loads_by_itself: bool


def is_pipeline(source: str, revision: str | None) -> bool:
    """Whether a source is a folder, or a repository of the hub, with model_index.json. Raises SourceError."""
    folder = Path(source).expanduser()
    if not folder.exists() and gguf_file(folder) is None:
        folder = fetch(source, revision, SMALL_FILES)
    return (folder / MODEL_INDEX).is_file()


def open_source(
    source: str, revision: str | None = None, *, adapter: str | None = None, allow_pickle: bool = False
) -> Source:
    """Find a model, and an adapter for it, and read its configuration.

    A source that is an adapter brings its base model along.
    Raises SourceError when there is no such model, or when it is not a text decoder that fmedge can read.
    """
    found = _find(source, revision, allow_pickle)
    merged = _find(adapter, None, allow_pickle) if adapter is not None else None
    if _is_adapter(found.folder):
        if merged is not None:
            raise SourceError(f"{source} is an adapter itself; export its base model with --adapter {adapter}.")
        found, merged = _base_of(found, allow_pickle), found
    elif merged is not None:
        read_adapter_config(merged.folder)
    folder = found.folder
    facts = _gguf_facts(found.gguf) if found.gguf is not None else _folder_facts(folder)
    config = facts.config
    files = Files(folder, None if merged is None else merged.folder, allow_pickle, facts.wrapper, found.gguf)
    layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    if not isinstance(layers, int):
        raise SourceError(
            f"{source} ({config.model_type}) does not say how many layers it has; its parts are not one decoder."
        )
    if layers < 1:
        raise SourceError(f"{folder / 'config.json'}: num_hidden_layers is {layers}; a decoder has one layer or more.")
    if merged is not None:
        _untie(config, files)
    # The weights are read as plain numbers, whatever their form in the files.
    vars(config).pop("quantization_config", None)
    return Source(
        id=found.name,
        revision=found.commit,
        files=files,
        config=config,
        licence=facts.licence,
        adapter=None if merged is None else merged.name,
        loads_by_itself=merged is None and facts.loads_by_itself,
    )


def _folder_facts(folder: Path) -> _Facts:
    raw = _raw_config(folder)
    config, wrapper = _decoder(folder, raw)
    plain = config.model_type == raw["model_type"] and not raw.get("quantization_config")
    return _Facts(config, wrapper, licence_of(folder, raw), plain)


def _gguf_facts(file: Path) -> _Facts:
    return _Facts(gguf_config(file), None, gguf_licence(file), loads_by_itself=False)


def _find(source: str, revision: str | None, allow_pickle: bool) -> _Found:
    folder = Path(source).expanduser()
    gguf = gguf_file(folder)
    if gguf is not None:
        if revision is not None:
            raise SourceError(f"--revision is for hub ids; {source} is a local file.")
        return _Found(gguf.name, None, gguf.parent, gguf)
    if folder.is_dir():
        if revision is not None:
            raise SourceError(f"--revision is for hub ids; {source} is a local folder.")
        return _Found(folder.resolve().name, None, folder)
    if folder.exists():
        raise SourceError(f"{source} is a file; give the folder that holds config.json, or a .gguf file.")
    folder, commit = _from_hub(source, revision, allow_pickle)
    return _Found(source, commit, folder)


def _is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def _base_of(adapter: _Found, allow_pickle: bool) -> _Found:
    """The model that an adapter was trained on."""
    config = read_adapter_config(adapter.folder)
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise SourceError(
            f"{adapter.folder} is an adapter that does not say its base model: export that, with "
            f"--adapter {adapter.folder}."
        )
    beside = adapter.folder / name
    try:
        revision = config.get("revision") if not Path(name).expanduser().is_dir() else None
        return _find(str(beside) if beside.is_dir() else name, revision, allow_pickle)
    except SourceError as error:
        raise SourceError(
            f"{adapter.folder} is an adapter whose base model cannot be had ({error}) Give the base model as the "
            f"source, with --adapter {adapter.folder}."
        ) from error


def _untie(config: PretrainedConfig, files: Files) -> None:
    """Embedding and head that are tied become two weights when the adapter changes one of them, or both apart."""
    if not getattr(config, "tie_word_embeddings", False) or files.adapter is None:
        return
    tied = dict(getattr(empty_model(config, torch.float32), "all_tied_weights_keys", None) or {})
    with ExitStack() as stack:
        adapter = Adapter(files.adapter, stack, allow_pickle=files.allow_pickle)
        if not adapter.config.get("ensure_weight_tying") and adapter.names() & (set(tied) | set(tied.values())):
            config.tie_word_embeddings = False


def _from_hub(source: str, revision: str | None, allow_pickle: bool) -> tuple[Path, str]:
    # The small files first: most refusals need no weights.
    folder = fetch(source, revision, SMALL_FILES)
    if _is_adapter(folder):
        read_adapter_config(folder)
    else:
        _decoder(folder, _raw_config(folder))
    # The cache names a snapshot's folder by its commit.
    commit = folder.name
    fetch(source, commit, ["*.safetensors"], IGNORED_WEIGHTS)
    if allow_pickle and not any(folder.glob("*.safetensors")):
        fetch(source, commit, PICKLES)
    return folder, commit


def _raw_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
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


def _decoder(folder: Path, raw: dict[str, Any]) -> tuple[PretrainedConfig, Wrapper | None]:
    """The configuration of the decoder, and the model around it if there is one.

    Raises SourceError when it is not what fmedge exports.
    """
    kind = raw["model_type"]
    find_format(raw.get("quantization_config") or {})
    if kind not in CONFIG_MAPPING_NAMES and raw.get("auto_map"):
        raise SourceError(
            f"{folder} ({kind}) needs code of its own (auto_map in config.json), which fmedge never runs; "
            "only architectures inside transformers can be exported."
        )
    try:
        with quiet_libraries():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # configurations raise what they like, validation errors of their own included
        raise SourceError(f"{folder / 'config.json'}: transformers cannot read it: {first_line(error)}") from error
    if config.get_text_config(decoder=True) is not config:
        return open_wrapper(config)
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise SourceError(
            f"{folder} ({kind}) is not a causal language model of transformers; fmedge exports text decoders."
        )
    return config, None


def licence_of(folder: Path, raw: Mapping[str, Any]) -> str | None:
    """What a configuration, or the card beside it, says of the licence."""
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
