"""The weights of a Hugging Face folder by a model's parameters, opened without reading them.

Names are translated by transformers' own conversion mapping, so a checkpoint is understood here exactly when
`from_pretrained` understands it. What lies in the files is the business of containers and formats: see stored.py.
"""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fmedge_runtimes.errors import SourceError
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from fmedge_converters.containers import open_tensors
from fmedge_converters.formats import find_format
from fmedge_converters.stored import Storage
from fmedge_converters.weight import Weight


class Checkpoint:
    """The weights of one model by parameter name; holds the files open until it is closed."""

    def __init__(self, folder: Path, dtype: np.dtype[np.generic], *, allow_pickle: bool = False) -> None:
        self.folder = folder
        self.dtype = dtype
        self._stack = ExitStack()
        try:
            tensors = open_tensors(folder, self._stack, allow_pickle=allow_pickle)
            quantization = _quantization(folder)
            self.tensors = find_format(quantization).decode(Storage(folder, tensors, quantization, dtype))
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
        """Numbers that the checkpoint holds, scales and zero points of a quantized one not counted."""
        return sum(math.prod(weight.shape) for weight in self.tensors.values())

    def weights(self, model: PreTrainedModel) -> dict[str, Weight]:
        """The weight of every parameter of `model` (whose own tensors may be fake or on the meta device).

        Raises SourceError: a parameter is missing, a shape differs, a storage type is not supported.
        """
        wanted = {name: tuple(value.shape) for name, value in model.named_parameters(remove_duplicate=False)}
        found = self._renamed(model, wanted)
        self._check_buffers(model, wanted)
        tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
        for target, origin in tied.items():
            if target in found and origin in found and found[target] is not found[origin]:
                self._check_equal(target, found[target], origin, found[origin])
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
                    f"{self.folder}: {name} has shape {list(found[name].shape)}, but config.json asks "
                    f"for {list(shape)}; the weights do not belong to this configuration."
                )
        return {name: found[name] for name in wanted}

    def _check_equal(self, target: str, first: Weight, origin: str, second: Weight) -> None:
        """Transformers unties weights that are stored twice with different values; the graph has one for both."""
        pairs = zip(first.blocks(), second.blocks(), strict=True)
        if first.shape != second.shape or not all(np.array_equal(left, right) for left, right in pairs):
            raise SourceError(
                f"{self.folder}: config.json ties {target} to {origin}, but the checkpoint holds different "
                "values for them; set tie_word_embeddings to false in config.json."
            )

    def _check_buffers(self, model: PreTrainedModel, wanted: dict[str, tuple[int, ...]]) -> None:
        """The graph holds buffers as the model makes them; a checkpoint that says otherwise is refused."""
        for name, value in model.state_dict().items():
            stored = self.tensors.get(name)
            if name in wanted or stored is None or value.is_meta:
                continue
            given = torch.from_numpy(stored.array())
            if given.shape != value.shape or not torch.equal(given.to(value.dtype), value):
                raise SourceError(
                    f"{self.folder}: {name} is not a parameter but a buffer with a value of its own in the checkpoint, "
                    f"which fmedge does not read yet for {model.config.model_type}."
                )

    def _renamed(self, model: PreTrainedModel, wanted: dict[str, tuple[int, ...]]) -> dict[str, Weight]:
        transforms = get_model_conversion_mapping(model)
        renamings = [item for item in transforms if isinstance(item, WeightRenaming)]
        converters = [item for item in transforms if isinstance(item, WeightConverter)]
        found: dict[str, Weight] = {}
        for name in sorted(self.tensors):
            if name in wanted:
                found[name] = self.tensors[name]
                continue
            target, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, wanted)
            if converted is not None and target in wanted:
                raise SourceError(
                    f"{self.folder}: {name} must be merged with other tensors into {target}, which fmedge "
                    f"does not do yet for {model.config.model_type}; load it with transformers and save it again."
                )
            if target in wanted:
                found[target] = self.tensors[name]
        return found


def _quantization(folder: Path) -> dict[str, Any]:
    """`quantization_config` of config.json, empty if it has none."""
    try:
        raw = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"cannot read {folder / 'config.json'}: {error}.") from error
    return dict(raw.get("quantization_config") or {})
