"""What lies in the files of a checkpoint, and how quantized forms of it become weights.

Three steps, each with a seam of its own, lead from files to parameters:

    containers   files      -> StoredTensor by name     safetensors, pickles, ...: how bytes lie in a file
    formats      StoredTensor -> Weight by name         plain floats, fp8, AWQ, GPTQ, ...: how numbers lie in tensors
    conversion   Weight     -> Weight by parameter      transformers' renaming and merging of tensors

A format sees the names of the checkpoint and answers with the names that the same checkpoint would have had without
quantization, so conversion knows nothing of it: `q_proj.qweight`, `.qzeros` and `.scales` become `q_proj.weight`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from fmedge_converters.weight import Weight

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types that can be read, as safetensors spells them."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file: known from the file's header, read when asked."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    """As safetensors spells it (DTYPES), or another word for what cannot be read as it is."""
    read: Callable[[int, int], torch.Tensor]
    """Rows start:stop of axis 0 in the stored type (a scalar is one row, and comes without an axis). Raises
    SourceError when the file cannot be read."""


@dataclass(frozen=True, slots=True)
class Storage:
    """All a format may look at."""

    folder: Path
    tensors: Mapping[str, StoredTensor]
    quantization: Mapping[str, Any]
    """`quantization_config` of config.json; empty if there is none."""
    dtype: np.dtype[np.generic]
    """What weights are read as: the floating type of the target."""


class Decode(Protocol):
    """Makes weights of stored tensors, by the names that they have in a checkpoint without quantization.

    Every stored tensor must be consumed or turned into a weight. Raises SourceError when the tensors contradict the
    configuration: a scale is missing, a shape is wrong.
    """

    def __call__(self, storage: Storage) -> dict[str, Weight]: ...


class Named(Protocol):
    """Finds the names that the tensors of a file of another kind have in transformers' checkpoints of a model.

    Raises SourceError for a tensor that the model has no place for.
    """

    def __call__(
        self, storage: Storage, tensors: Mapping[str, Weight], model: PreTrainedModel
    ) -> Mapping[str, Weight]: ...


@dataclass(frozen=True, slots=True)
class Format:
    """A row of the table of formats (formats/__init__.py)."""

    name: str
    matches: Callable[[Mapping[str, Any]], bool]
    """Whether a `quantization_config` is of this format."""
    decode: Decode
    named: Named | None = None
    """For files with names of their own; None: names are those of transformers' checkpoints."""


@dataclass(frozen=True, slots=True)
class Container:
    """A row of the table of containers (containers/__init__.py)."""

    name: str
    wanted: str
    """The file to look for, as messages name it."""
    find: Callable[[Path], tuple[Path, ...]]
    """The files of a model folder, empty if it has none of this kind. Raises SourceError when some are missing."""
    open: Callable[[Sequence[Path], ExitStack], dict[str, StoredTensor]]
    """Their tensors by name; the stack closes the files. Raises SourceError when a file is damaged."""
    unsafe: bool = False
    """Whether such a file can carry code, so that a person must allow it."""
