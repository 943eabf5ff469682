"""The kinds of files that hold a model's tensors: one row and one file each, looked for in this order."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from fmedge_runtimes.errors import SourceError

from fmedge_converters.containers.gguf import GGUF
from fmedge_converters.containers.safetensors import SAFETENSORS
from fmedge_converters.containers.torch_pickle import TORCH_PICKLE
from fmedge_converters.stored import Container, StoredTensor

CONTAINERS: tuple[Container, ...] = (SAFETENSORS, TORCH_PICKLE, GGUF)
ADAPTERS = {"adapter_model.safetensors": SAFETENSORS, "adapter_model.bin": TORCH_PICKLE}
"""The files in which PEFT keeps an adapter, in the order in which it looks."""


def open_tensors(folder: Path, stack: ExitStack, *, allow_pickle: bool) -> dict[str, StoredTensor]:
    """Every tensor of a model folder, or of a GGUF file, by its name in the files, which `stack` closes.

    Raises SourceError: there are no weights, a file is missing or damaged, or is a pickle and that is not allowed.
    """
    for row in CONTAINERS:
        files = row.find(folder)
        if files:
            return _open(row, files, stack, allow_pickle)
    raise SourceError(f"{folder} holds no weights: there is no {' or '.join(row.wanted for row in CONTAINERS)}.")


def open_adapter_tensors(folder: Path, stack: ExitStack, *, allow_pickle: bool) -> dict[str, StoredTensor]:
    """Every tensor of a PEFT folder. Raises SourceError as `open_tensors` does."""
    for name, row in ADAPTERS.items():
        if (folder / name).is_file():
            return _open(row, (folder / name,), stack, allow_pickle)
    raise SourceError(f"{folder} holds no weights of an adapter: there is no {' or '.join(ADAPTERS)}.")


def _open(row: Container, files: tuple[Path, ...], stack: ExitStack, allow_pickle: bool) -> dict[str, StoredTensor]:
    if row.unsafe and not allow_pickle:
        raise SourceError(
            f"{files[0].parent} holds its weights as a pickle ({files[0].name}), a format that can carry code; "
            "--allow-pickle reads it with PyTorch's weights-only loader, which runs none."
        )
    return row.open(files, stack)
