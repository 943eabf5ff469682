"""Rows of a tensor that lies in a file as it lies in memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from fmedge_runtimes.errors import SourceError


def rows_in_file(
    file: Path, name: str, dtype: torch.dtype, shape: tuple[int, ...], offset: int
) -> Callable[[int, int], torch.Tensor]:
    """A function that reads the rows start:stop of a tensor that begins at a byte of the file.

    It raises SourceError when the file cannot be read any more.
    """

    def read(start: int, stop: int) -> torch.Tensor:
        start, stop, _ = slice(start, stop).indices(shape[0]) if shape else (0, 1, 1)
        row = math.prod(shape[1:]) * dtype.itemsize
        wanted = max(0, stop - start) * row
        try:
            # Read, not mapped: pages of a mapped file would count as this process's memory.
            data = np.fromfile(file, np.uint8, wanted, offset=offset + start * row)
        except OSError as error:
            raise SourceError(f"{file}: cannot read {name} ({error.strerror}).") from error
        if data.size != wanted:
            raise SourceError(f"{file} has become shorter while it was read; copy it again.")
        return torch.from_numpy(data).view(dtype).reshape((stop - start, *shape[1:]) if shape else ())

    return read
