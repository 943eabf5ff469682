"""The tensors of a checkpoint by their modules: `q_proj.qweight`, `.scales` and `.qzeros` are one matrix."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from fmedge_runtimes.errors import SourceError

from fmedge_converters.stored import StoredTensor
from fmedge_converters.weight import Array


@dataclass(frozen=True, slots=True)
class QuantizedModule:
    """A linear layer that is stored as several tensors."""

    name: str
    parts: Mapping[str, StoredTensor]

    @property
    def where(self) -> str:
        """The module and its file, for messages."""
        return f"{next(iter(self.parts.values())).file}: {self.name}"

    def part(self, name: str, dtypes: Collection[str], dimensions: int = 2) -> StoredTensor:
        """One of its tensors.

        Raises SourceError when it is missing, or is not of one of the types and that number of dimensions.
        """
        if name not in self.parts:
            raise SourceError(f"{self.where} lacks its {name}: the checkpoint is incomplete; copy it again.")
        tensor = self.parts[name]
        if tensor.dtype not in dtypes or len(tensor.shape) != dimensions:
            raise SourceError(
                f"{self.where}.{name} is {tensor.dtype} {list(tensor.shape)}; fmedge reads {' or '.join(dtypes)} with "
                f"{dimensions} dimensions here."
            )
        return tensor

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise SourceError when a tensor has another shape than the configuration and the other tensors ask for."""
        found = self.parts[name].shape
        if found != shape:
            raise SourceError(
                f"{self.where}.{name} has shape {list(found)} where {list(shape)} is expected; "
                "quantization_config contradicts the weights."
            )


def quantized_modules(
    tensors: Mapping[str, StoredTensor], main: Sequence[str], others: Collection[str]
) -> tuple[list[QuantizedModule], dict[str, StoredTensor]]:
    """The modules that have one of the tensors `main`, with those of the `others` that they have; and what remains.

    Raises SourceError for one of the others without a main one.
    """
    parts: dict[str, dict[str, StoredTensor]] = {}
    rest: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        prefix, _, part = name.rpartition(".")
        if part in main or part in others:
            parts.setdefault(prefix, {})[part] = tensor
        else:
            rest[name] = tensor
    modules = [QuantizedModule(prefix, found) for prefix, found in parts.items()]
    for module in modules:
        if not any(name in module.parts for name in main):
            raise SourceError(f"{module.where} lacks its {main[0]}: the checkpoint is incomplete; copy it again.")
    return modules, rest


def read_all(tensor: StoredTensor) -> torch.Tensor:
    """The whole tensor, in the type that it is stored in."""
    return tensor.read(0, tensor.shape[0])


def group_indices(module: QuantizedModule, name: str, columns: int, count: int) -> Array | None:
    """The group of each input feature [K] from a tensor of act-order; None when it is not there, or not filled in.

    Raises SourceError when it has another shape or names other groups than 0 to `count` - 1.
    """
    if name not in module.parts or module.parts[name].shape == (0,):
        return None
    stored = module.part(name, ("I32", "I64"), dimensions=1)
    module.check(name, (columns,))
    groups: Array = read_all(stored).numpy().astype(np.int64)
    if (groups == -1).all():
        return None
    if groups.min() < 0 or groups.max() >= count:
        raise SourceError(
            f"{module.where}.{name} names the groups {groups.min()} to {groups.max()}, but there are {count}; "
            "the checkpoint is damaged."
        )
    return groups
