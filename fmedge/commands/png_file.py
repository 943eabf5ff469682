"""Where commands write images: found out before anything is rendered, and each file whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

from fmedge_runtimes.errors import RequestError
from fmedge_runtimes.generated_image import write_aside

PNG = ".png"


def is_png(path: str) -> bool:
    """Whether a path means a single PNG, not a folder."""
    return Path(path).suffix.lower() == PNG and not os.path.isdir(path)  # noqa: PTH112 - never raises


def check_places(paths: list[Path], *, force: bool) -> None:
    """Raise RequestError if one of these files cannot be written, or is there and may not be replaced."""
    for path in paths:
        try:
            _check_place(path, force=force)
        except OSError as error:  # as for a name that is too long
            raise RequestError(f"cannot write {path}: {error.strerror}.") from error


def _check_place(path: Path, *, force: bool) -> None:
    if path.is_dir():
        raise RequestError(f"cannot write {path}: it is a folder; give another place.")
    if path.exists() and not force:
        raise RequestError(f"{path} exists; replace it with --force, or give another place.")
    nearest = next(folder for folder in path.absolute().parents if folder.exists())
    if not nearest.is_dir():
        raise RequestError(f"cannot write {path}: {nearest} is not a folder.")
    if not os.access(nearest, os.W_OK):
        raise RequestError(f"cannot write {path}: {nearest} is not writable.")


def write_png(path: Path, content: bytes) -> None:
    """Write a file and the folders above it. Raises RequestError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_aside(path, content)
    except OSError as error:
        raise RequestError(f"cannot write {path}: {error.strerror}.") from error
