"""The safetensors files of a Hugging Face folder, opened without reading them.

A checkpoint maps the names of a model's parameters to weights. Names are translated by transformers' own
conversion mapping, so a checkpoint is understood here exactly when `from_pretrained` understands it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fmedge_runtimes.errors import SourceError
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from fmedge_converters.weight import Array, Weight

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")

FLOATS = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies, from the header of its file."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def checkpoint_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a model folder.

    Raises SourceError: no safetensors (pickles are named), a shard of the index is missing.
    """
    # The order in which transformers looks.
    if (folder / SINGLE).is_file():
        return (folder / SINGLE,)
    index = folder / INDEX
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError, OSError) as error:
            raise SourceError(f"{index} is not a safetensors index ({error}); copy it again.") from error
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise SourceError(
                f"{folder} lacks {len(missing)} of its {len(shards)} shards, {missing[0]} first; "
                "download or copy the folder again."
            )
        return tuple(folder / shard for shard in shards)
    pickles = [path.name for pattern in PICKLES for path in sorted(folder.glob(pattern))]
    if pickles:
        raise SourceError(
            f"{folder} holds its weights as a pickle ({pickles[0]}), which can run code when it is read; "
            "load it with transformers once and save it with save_pretrained, which writes safetensors."
        )
    raise SourceError(f"{folder} holds no weights: neither {SINGLE} nor {INDEX} is there.")


def stored_tensors(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Every tensor of the files, by its name in the file, from the headers alone.

    Raises SourceError when a file is truncated or is not safetensors.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as reader:
                for name in reader.keys():  # noqa: SIM118 - the reader is not a mapping
                    part = reader.get_slice(name)
                    tensors[name] = StoredTensor(file, name, tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError) as error:
            raise SourceError(
                f"{file} is damaged or is not safetensors ({error}); download or copy it again."
            ) from error
    return tensors


class Checkpoint:
    """The weights of one model by parameter name; holds the files open until it is closed."""

    def __init__(self, folder: Path, dtype: np.dtype[np.generic]) -> None:
        self.folder = folder
        self.dtype = dtype
        self.stored = stored_tensors(checkpoint_files(folder))
        self._stack = ExitStack()
        self._readers: dict[Path, Any] = {}

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        self._readers.clear()
        self._stack.close()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(file.stat().st_size for file in {tensor.file for tensor in self.stored.values()})

    def weights(self, model: PreTrainedModel) -> dict[str, Weight]:
        """The weight of every parameter of `model` (whose own tensors may be fake or on the meta device).

        Raises SourceError: a parameter is missing, a shape differs, a storage type is not supported.
        """
        wanted = {name: tuple(value.shape) for name, value in model.named_parameters(remove_duplicate=False)}
        found = self._renamed(model, wanted)
        self._check_buffers(model, wanted)
        tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
        for target, origin in tied.items():
            if target in found and origin in found and found[target] != found[origin]:
                self._check_equal(found[target], found[origin])
            if target not in found and origin in found:
                found[target] = found[origin]
            elif origin not in found and target in found:
                found[origin] = found[target]
        missing = sorted(set(wanted) - set(found))
        if missing:
            raise SourceError(
                f"{self.folder} lacks {len(missing)} of the model's {len(wanted)} tensors, {missing[0]} first; "
                "its weights do not belong to its config.json."
            )
        for name, shape in wanted.items():
            if found[name].shape != shape:
                raise SourceError(
                    f"{self.folder}: {found[name].name} has shape {list(found[name].shape)}, but config.json asks "
                    f"for {list(shape)}; the weights do not belong to this configuration."
                )
        return {name: self._weight(found[name]) for name in wanted}

    def _check_equal(self, first: StoredTensor, second: StoredTensor) -> None:
        """Transformers unties weights that are stored twice with different values; the graph has one for both."""
        pairs = zip(self._weight(first).blocks(), self._weight(second).blocks(), strict=True)
        if first.shape != second.shape or not all(np.array_equal(left, right) for left, right in pairs):
            raise SourceError(
                f"{self.folder}: config.json ties {first.name} to {second.name}, but the checkpoint holds different "
                "values for them; set tie_word_embeddings to false in config.json."
            )

    def _check_buffers(self, model: PreTrainedModel, wanted: dict[str, tuple[int, ...]]) -> None:
        """The graph holds buffers as the model makes them; a checkpoint that says otherwise is refused."""
        for name, value in model.state_dict().items():
            stored = self.stored.get(name)
            if name in wanted or stored is None or value.is_meta:
                continue
            given = torch.from_numpy(self._weight(stored).array())
            if given.shape != value.shape or not torch.equal(given.to(value.dtype), value):
                raise SourceError(
                    f"{self.folder}: {name} is not a parameter but a buffer with a value of its own in the checkpoint, "
                    f"which fmedge does not read yet for {model.config.model_type}."
                )

    def _renamed(self, model: PreTrainedModel, wanted: dict[str, tuple[int, ...]]) -> dict[str, StoredTensor]:
        transforms = get_model_conversion_mapping(model)
        renamings = [item for item in transforms if isinstance(item, WeightRenaming)]
        converters = [item for item in transforms if isinstance(item, WeightConverter)]
        found: dict[str, StoredTensor] = {}
        for name in sorted(self.stored):
            if name in wanted:
                found[name] = self.stored[name]
                continue
            target, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, wanted)
            if converted is not None and target in wanted:
                raise SourceError(
                    f"{self.folder}: {name} must be merged with other tensors into {target}, which fmedge "
                    f"does not do yet for {model.config.model_type}; load it with transformers and save it again."
                )
            if target in wanted:
                found[target] = self.stored[name]
        return found

    def _weight(self, tensor: StoredTensor) -> Weight:
        if tensor.dtype not in FLOATS:
            raise SourceError(
                f"{tensor.file}: {tensor.name} is stored as {tensor.dtype}, a quantized form that fmedge does not "
                f"read yet; export the model from its {', '.join(sorted(FLOATS))} checkpoint."
            )
        dtype = torch.from_numpy(np.empty(0, self.dtype)).dtype

        def read(start: int, stop: int) -> Array:
            if tensor.file not in self._readers:
                self._readers[tensor.file] = self._stack.enter_context(safe_open(tensor.file, framework="pt"))
            try:
                part = self._readers[tensor.file].get_slice(tensor.name)[start:stop]
            except (SafetensorError, OSError) as error:
                raise SourceError(f"{tensor.file}: cannot read {tensor.name} ({error}).") from error
            array: Array = part.to(dtype).contiguous().numpy()
            if self.dtype == np.float16 and not np.isfinite(array).all():
                raise SourceError(
                    f"{tensor.file}: {tensor.name} has values beyond fp16's range (65504) or not finite; "
                    "this model cannot run in fp16."
                )
            return array

        return Weight(tensor.shape, self.dtype, read)
