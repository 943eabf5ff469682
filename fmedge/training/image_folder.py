"""A folder of pictures with captions: read, checked as a whole, and cut to one size.

Captions stand in metadata.jsonl (`{"file_name": "a.png", "text": "a red circle"}` a line, as in Hugging Face's image
folders), or in a .txt file beside each picture. Nothing is trained unless every picture can be used: DataError names
the first few that cannot, and says how many there are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fmedge_runtimes.errors import DataError
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

METADATA = "metadata.jsonl"
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
PROBLEMS_SHOWN = 5


@dataclass(frozen=True, slots=True)
class CaptionedPictures:
    """Pictures and what they show."""

    pictures: NDArray[np.uint8]
    """[N, S, S, 3], or empty where they were not wanted."""
    captions: tuple[str, ...]
    files: tuple[str, ...]
    """Their names, relative to the folder."""


def read_image_folder(folder: Path, side: int | None) -> CaptionedPictures:
    """Read every picture, scaled and cropped around its middle to `side`; None: as they are, all of one square size."""
    captions, problems = _captions(folder)
    pictures: list[NDArray[np.uint8]] = []
    for name in captions:
        try:
            pictures.append(_picture(folder / name, side))
        except _UnusableError as error:
            problems.append(f"{name}: {error}")
    if side is None and len({picture.shape for picture in pictures}) > 1:
        shapes = sorted({f"{picture.shape[1]}x{picture.shape[0]}" for picture in pictures})
        problems.append(f"the pictures have several sizes: {', '.join(shapes[:PROBLEMS_SHOWN])}")
    if problems:
        shown = "".join(f"\n  {problem}" for problem in problems[:PROBLEMS_SHOWN])
        more = len(problems) - PROBLEMS_SHOWN
        rest = f"\n  and {more} more" if more > 0 else ""
        raise DataError(f"{folder}: {len(problems)} of its pictures and captions cannot be used:{shown}{rest}")
    return CaptionedPictures(np.stack(pictures), tuple(captions.values()), tuple(captions))


class _UnusableError(Exception):
    """Why one picture cannot be used."""


def _captions(folder: Path) -> tuple[dict[str, str], list[str]]:
    """Captions by the picture's name, and what is wrong with the others."""
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder: name one that holds pictures and their captions")
    names = list(_picture_names(folder))
    captions, problems = (
        _captions_from_metadata(folder, names) if (folder / METADATA).is_file() else _captions_beside(folder, names)
    )
    if not names and not captions and not problems:
        raise DataError(f"{folder}: the folder holds no picture ({', '.join(SUFFIXES)})")
    return captions, problems


def _picture_names(folder: Path) -> Iterator[str]:
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield Path(root, name).relative_to(folder).as_posix()


def _captions_from_metadata(folder: Path, names: list[str]) -> tuple[dict[str, str], list[str]]:
    captions: dict[str, str] = {}
    problems: list[str] = []
    for number, line in enumerate(_text(folder / METADATA).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            name, caption = _entry(line)
            if name in captions:
                raise _UnusableError(f"{name} has a caption already")
            if not (folder / name).is_file():
                raise _UnusableError(f"there is no file {name}")
        except _UnusableError as error:
            problems.append(f"{METADATA}, line {number}: {error}")
        else:
            captions[name] = caption
    problems += [f"{name}: {METADATA} has no caption for it" for name in names if name not in captions]
    return captions, problems


def _entry(line: str) -> tuple[str, str]:
    """One line's file name and caption."""
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise _UnusableError(f"is not JSON: {error}") from error
    if not isinstance(entry, Mapping):
        raise _UnusableError("is no JSON object")
    name, caption = entry.get("file_name"), entry.get("text")
    if not isinstance(name, str) or not name:
        raise _UnusableError('has no "file_name"')
    if not isinstance(caption, str) or not caption.strip():
        raise _UnusableError(f'has no "text" for {name}')
    if not caption.isascii() and any("\ud800" <= letter <= "\udfff" for letter in caption):
        raise _UnusableError(f'has a "text" for {name} that is no valid Unicode')
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise _UnusableError(f"names a file outside of the folder: {name}")
    return Path(name).as_posix(), " ".join(caption.split())


def _captions_beside(folder: Path, names: list[str]) -> tuple[dict[str, str], list[str]]:
    captions: dict[str, str] = {}
    problems: list[str] = []
    for name in names:
        file = (folder / name).with_suffix(".txt")
        caption = _text(file).strip() if file.is_file() else ""
        if caption:
            captions[name] = " ".join(caption.split())
        else:
            state = "is empty" if file.is_file() else "is missing"
            problems.append(f"{name}: its caption {file.name} {state}, and there is no {METADATA}")
    return captions, problems


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as UTF-8 text: {error}") from error


def _picture(file: Path, side: int | None) -> NDArray[np.uint8]:
    """Read one picture as [H, W, 3]; what is transparent becomes white."""
    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGBA")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _UnusableError(f"cannot be read as a picture: {error}") from error
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if side is None:
        if image.width != image.height:
            raise _UnusableError(f"is {image.width}x{image.height} and not square")
        return np.asarray(image)
    if min(image.size) < side:
        raise _UnusableError(f"is {image.width}x{image.height}, smaller than the size of {side} to train at")
    return np.asarray(ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS))
