"""The kinds of files that hold a model's tensors: one row and one file each, looked for in this order."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from fmedge_runtimes.errors import SourceError

from fmedge_converters.containers.safetensors import SAFETENSORS
from fmedge_converters.containers.torch_pickle import TORCH_PICKLE
from fmedge_converters.stored import Container, StoredTensor

CONTAINERS: tuple[Container, ...] = (SAFETENSORS, TORCH_PICKLE)


def open_tensors(folder: Path, stack: ExitStack, *, allow_pickle: bool) -> dict[str, StoredTensor]:
    """Every tensor of a model folder by its name in the files, which `stack` closes.

    Raises SourceError: there are no weights, a file is missing or damaged, or is a pickle and that is not allowed.
    """
    for row in CONTAINERS:
        files = row.find(folder)
        if files and row.unsafe and not allow_pickle:
            raise SourceError(
                f"{folder} holds its weights as a pickle ({files[0].name}), a format that can carry code; "
                "--allow-pickle reads it with PyTorch's weights-only loader, which runs none."
            )
        if files:
            return row.open(files, stack)
    raise SourceError(f"{folder} holds no weights: there is no {' or '.join(row.wanted for row in CONTAINERS)}.")
