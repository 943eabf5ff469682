"""PyTorch's pickles: pytorch_model.bin, one file or shards with an index.

Only torch's weights-only unpickler touches them, which builds tensors and nothing else, and the file is mapped: a
tensor's rows come from the disk when they are read.
"""

from __future__ import annotations

import functools
import zipfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from fmedge_runtimes.errors import SourceError

from fmedge_converters.containers.shards import add_tensors, indexed_files, refuse_pointer
from fmedge_converters.first_line import first_line
from fmedge_converters.stored import DTYPES, Container, StoredTensor

SINGLE = "pytorch_model.bin"
NAMES = (SINGLE, "diffusion_pytorch_model.bin")
"""How transformers and diffusers name the weights of a model."""
OTHERS = ("*.bin", "*.pt", "*.pth", "*.ckpt")
CONVERT = "load it with transformers once and save it with save_pretrained, which writes safetensors"

KINDS = {dtype: name for name, dtype in DTYPES.items()}


def find(folder: Path) -> tuple[Path, ...]:
    """The files, in the order in which transformers looks; empty if there are none.

    Raises SourceError: a shard of the index is missing; there are pickles, but not as transformers names them.
    """
    for name in NAMES:
        if (folder / name).is_file():
            return (folder / name,)
        if (folder / f"{name}.index.json").is_file():
            return indexed_files(folder / f"{name}.index.json")
    others = [path.name for pattern in OTHERS for path in sorted(folder.glob(pattern))]
    if others:
        raise SourceError(f"{folder} holds a pickle under a name of its own ({others[0]}), and no {SINGLE}; {CONVERT}.")
    return ()


def open_files(files: Sequence[Path], _stack: ExitStack) -> dict[str, StoredTensor]:
    """Every tensor of the files by its name. The mapping of a file ends with the last of its tensors.

    Raises SourceError: a file is damaged, is of PyTorch's old format, or holds something else than tensors by name.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        refuse_pointer(file)
        add_tensors(tensors, [_stored(file, name, tensor) for name, tensor in _load(file).items()])
    return tensors


def _stored(file: Path, name: object, tensor: object) -> StoredTensor:
    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
        kind = type(tensor).__name__
        raise SourceError(f"{file} is not a plain table of tensors: {str(name)[:60]!r} is a {kind}; {CONVERT}.")
    kind = KINDS.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
    return StoredTensor(file, name, tuple(tensor.shape), kind, functools.partial(_read, tensor))


def _load(file: Path) -> dict[object, object]:
    if not zipfile.is_zipfile(file):
        raise SourceError(
            f"{file} is damaged, or written in the format of PyTorch before 1.6, which cannot be read piece by piece; "
            f"copy it again, or {CONVERT}."
        )
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a damaged pickle makes torch raise
        raise SourceError(
            f"{file} is damaged or holds more than tensors, and code in it is never run ({first_line(error)[:160]}); "
            f"copy it again, or {CONVERT}."
        ) from error
    if not isinstance(content, dict):
        raise SourceError(f"{file} holds a {type(content).__name__} instead of tensors by name; {CONVERT}.")
    return content


def _read(tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    return tensor.detach()[start:stop] if tensor.dim() else tensor.detach()


TORCH_PICKLE = Container("pickle", SINGLE, find, open_files, unsafe=True)
