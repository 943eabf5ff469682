"""The weights of a Hugging Face folder by a model's parameters, opened without reading them.

What lies in the files is the business of containers and formats (stored.py); names and layouts are translated by
transformers' own rules (conversion.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fmedge_runtimes.errors import SourceError
from transformers import PreTrainedModel

from fmedge_converters.adapter import Adapter, Change
from fmedge_converters.containers import open_tensors
from fmedge_converters.containers.gguf import ARCHITECTURE, read_header
from fmedge_converters.conversion import converted
from fmedge_converters.formats import find_format
from fmedge_converters.formats.gguf import METHOD
from fmedge_converters.formats.plain import FLOATS, INTEGERS, PLAIN
from fmedge_converters.stored import Storage
from fmedge_converters.unplaced import require_no_part
from fmedge_converters.weight import Array, Weight, equal
from fmedge_converters.wrapper import Wrapper


@dataclass(frozen=True, slots=True)
class Files:
    """Where the weights of a model lie, and how they may be read."""

    folder: Path
    adapter: Path | None = None
    """A PEFT folder to merge."""
    allow_pickle: bool = False
    wrapper: Wrapper | None = None
    """The model that the checkpoint is of, if the decoder is a part of it."""
    gguf: Path | None = None
    """A GGUF file of the folder, which the weights are in."""

    @property
    def weights(self) -> Path:
        """What holds the weights: the folder or the GGUF file."""
        return self.gguf or self.folder


class Checkpoint:
    """The weights of one model by parameter name; holds the files open until it is closed."""

    def __init__(self, files: Files, dtype: np.dtype[np.generic]) -> None:
        self.folder = files.weights
        self.dtype = dtype
        self._wrapper = files.wrapper
        self._stack = ExitStack()
        self._adapter: Adapter | None = None
        try:
            tensors = open_tensors(files.weights, self._stack, allow_pickle=files.allow_pickle)
            quantization = _quantization(files.weights)
            self._format = find_format(quantization)
            self._storage = Storage(files.weights, tensors, quantization, dtype)
            self.tensors = self._format.decode(self._storage)
            if files.adapter is not None:
                self._adapter = Adapter(files.adapter, self._stack, allow_pickle=files.allow_pickle)
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        self._stack.close()

    @property
    def parameters(self) -> int:
        """Numbers that the decoder's part of the checkpoint holds; scales and zero points are not counted."""
        if self._wrapper is None:
            return sum(math.prod(weight.shape) for weight in self.tensors.values())
        whole = self._wrapper.model.state_dict()
        return sum(whole[name].numel() for name in set(self._wrapper.names.values()))

    @property
    def source_format(self) -> str | None:
        """How the checkpoint is quantized, None if it is not."""
        if self._format is PLAIN:
            return None
        own = {tensor.dtype for tensor in self._storage.tensors.values()} - {*FLOATS, *INTEGERS}
        return " ".join([self._format.name, *sorted(own)])

    def weights(self, model: PreTrainedModel) -> dict[str, Weight]:
        """The weight of every parameter of `model` (whose own tensors may be fake or on the meta device).

        Raises SourceError: a parameter is missing, a shape differs, a storage type is not supported. Reading a weight
        raises it when it has values that are not finite, or that fp16 cannot hold.
        """
        wanted = {name: tuple(value.shape) for name, value in model.named_parameters(remove_duplicate=False)}
        tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
        tensors = self._named(self.tensors, model)
        if self._adapter is not None:
            changes = self._in_decoder(self._adapter.changes(model, self.dtype))
            tensors = self._adapter.applied({name: changes[name] for name in set(changes) - set(wanted)}, tensors)
        unplaced: dict[str, Weight] = {}
        found = self._converted(tensors, model, unplaced=unplaced)
        whole = model if self._wrapper is None else self._wrapper.model
        placed = found if self._wrapper is None else [self._wrapper.names[name] for name in found]
        require_no_part(unplaced, placed, whole, self.folder, explained=self._format is not PLAIN)
        self._check_tied(found, tied)
        # An adapter that changes one of two tied weights has untied them; its base holds them once.
        _share(found, tied if self._adapter is None else {**(getattr(model, "_tied_weights_keys", None) or {}), **tied})
        missing = sorted(set(wanted) - set(found))
        if missing:
            raise SourceError(
                f"{self.folder} lacks {len(missing)} of the model's {len(wanted)} tensors, {missing[0]} first; "
                "its weights do not belong to its config.json."
            )
        if self._adapter is not None:
            late = self._adapter.applied({name: changes[name] for name in set(changes) & set(wanted)}, found)
            changed = {name: weight for name, weight in late.items() if weight is not found[name]}
            _share(changed, tied)
            found |= changed
        for name, shape in wanted.items():
            self._check_shape(name, found[name], shape)
            if found[name].dtype != self.dtype:
                raise SourceError(
                    f"{self.folder}: {name} is stored as {found[name].dtype}, which is no floating type, and "
                    "config.json names no quantization that would explain it; export the model's original checkpoint."
                )
        # One weight for both names of a tied one, so that it is written once without a comparison.
        checked = {id(found[name]): self._finite(name, found[name]) for name in wanted}
        return {name: checked[id(found[name])] for name in wanted}

    def _named(self, tensors: Mapping[str, Weight], model: PreTrainedModel) -> Mapping[str, Weight]:
        """The tensors by the names that they have in transformers' checkpoints."""
        return tensors if self._format.named is None else self._format.named(self._storage, tensors, model)

    def buffers(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """The persistent buffers of `model` that the checkpoint has values for, in the buffers' own dtypes.

        Raises SourceError when a shape differs.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        buffers = {name: value for name, value in model.state_dict().items() if name not in parameters}
        # In fp32, which holds what is stored in any type; a buffer need not have the type of the weights.
        stored = self._format.decode(replace(self._storage, dtype=np.dtype(np.float32))) if buffers else {}
        found = self._converted(self._named(stored, model), model, buffers)
        for name, weight in found.items():
            self._check_shape(name, weight, tuple(buffers[name].shape))
        return {name: torch.from_numpy(weight.array()).to(buffers[name].dtype) for name, weight in found.items()}

    def _converted(
        self,
        tensors: Mapping[str, Weight],
        model: PreTrainedModel,
        names: Collection[str] | None = None,
        unplaced: dict[str, Weight] | None = None,
    ) -> dict[str, Weight]:
        if not isinstance(model, PreTrainedModel):
            return _of_diffusers(tensors, model, names)
        if self._wrapper is None:
            return converted(tensors, model, names, unplaced=unplaced)
        asked = {other: name for name, other in self._wrapper.names.items() if names is None or name in names}
        whole = converted(tensors, self._wrapper.model, asked, unplaced=unplaced)
        return {asked[other]: weight for other, weight in whole.items()}

    def _in_decoder(self, changes: dict[str, list[Change]]) -> dict[str, list[Change]]:
        """Changes by the decoder's names; an adapter that was trained on the whole model has that one's."""
        if self._wrapper is None:
            return changes
        alone = {other: name for name, other in self._wrapper.names.items()}
        return {alone.get(name, name): steps for name, steps in changes.items()}

    def _check_tied(self, found: Mapping[str, Weight], tied: Mapping[str, str]) -> None:
        """Transformers unties weights that are stored twice with different values; the graph has one for both."""
        for target, origin in tied.items():
            both = target in found and origin in found and found[target] is not found[origin]
            if both and not equal(found[target], found[origin]):
                raise SourceError(
                    f"{self.folder}: config.json ties {target} to {origin}, but the checkpoint holds different "
                    "values for them; set tie_word_embeddings to false in config.json."
                )

    def _check_shape(self, name: str, weight: Weight, shape: tuple[int, ...]) -> None:
        if weight.shape != shape:
            raise SourceError(
                f"{self.folder}: {name} has shape {list(weight.shape)}, but config.json asks for {list(shape)}; "
                "the weights do not belong to this configuration."
            )

    def _finite(self, name: str, weight: Weight) -> Weight:
        """The weight, which refuses to be read if it holds what is no number."""
        if self.dtype == np.float16:
            reason = (
                "or beyond fp16's range (65504); this model cannot run in fp16: export it for a target that computes "
                "in fp32 (cpu)."
            )
        else:
            reason = "so no output of the model means anything; the checkpoint is damaged: download or copy it again."

        def read(start: int, stop: int) -> Array:
            array = weight.read(start, stop)
            if not np.isfinite(array).all():
                raise SourceError(f"{self.folder}: {name} has values that are not finite, {reason}")
            return array

        return replace(weight, read=read)


def _of_diffusers(
    tensors: Mapping[str, Weight],
    model: Any,  # noqa: ANN401 - any model of diffusers
    names: Collection[str] | None,
) -> dict[str, Weight]:
    """The weights by the names of a model of diffusers, which renames those of older versions itself."""
    renamed = dict(tensors)
    model._fix_state_dict_keys_on_load(renamed)
    known = model.state_dict() if names is None else names
    return {name: weight for name, weight in renamed.items() if name in known}


def _share(weights: dict[str, Weight], tied: Mapping[str, str]) -> None:
    """Give a weight that is tied to another, and there once, to both names."""
    for target, origin in tied.items():
        if target not in weights and origin in weights:
            weights[target] = weights[origin]
        elif origin not in weights and target in weights:
            weights[origin] = weights[target]


def _quantization(folder: Path) -> Mapping[str, Any]:
    """`quantization_config` of config.json, empty if it has none; for a GGUF file what stands in its place."""
    if folder.is_file():
        return {"quant_method": METHOD, "architecture": read_header(folder).metadata.get(ARCHITECTURE)}
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text("utf-8")).get("quantization_config") or {}
    except (OSError, ValueError, AttributeError) as error:
        raise SourceError(f"cannot read {path}: {error}.") from error
    if not isinstance(found, dict):
        raise SourceError(f"{path}: its quantization_config is no table of settings; copy it again.")
    return found
