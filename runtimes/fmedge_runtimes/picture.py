"""Images and masks that a request starts from, as arrays of the size that is rendered."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fmedge_runtimes.errors import RequestError

if TYPE_CHECKING:
    from PIL.Image import Image


def open_picture(given: str | PathLike[str] | Image, what: str) -> Image:
    """The image itself, loaded and upright. Raises RequestError when there is none."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        if isinstance(given, Image.Image):
            given.load()
            return given
        with Image.open(given) as file:
            return ImageOps.exif_transpose(file)
    except FileNotFoundError as error:
        raise RequestError(f"{what}: there is no file {given}.") from error
    except UnidentifiedImageError as error:
        raise RequestError(f"{what}: {given} is no image that can be read.") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RequestError(f"{what}: {given} cannot be read ({error}).") from error


def image_array(image: Image, height: int, width: int) -> npt.NDArray[np.float32]:
    """The image [3, height, width] in -1 to 1, resized by Lanczos' filter, as diffusers does."""
    return _array(image, "RGB", height, width) * np.float32(2) - np.float32(1)


def pixels(image: Image, height: int, width: int) -> npt.NDArray[np.uint8]:
    """The image [height, width, 3], resized in the same way."""
    return np.asarray(_resized(image, "RGB", height, width))


def mask_array(mask: Image, height: int, width: int) -> npt.NDArray[np.float32]:
    """The mask [1, height, width]: 1 where it is bright, else 0."""
    return (_array(mask, "L", height, width) >= np.float32(0.5)).astype(np.float32)


def _array(image: Image, mode: str, height: int, width: int) -> npt.NDArray[np.float32]:
    levels = np.asarray(_resized(image, mode, height, width), np.float32) / np.float32(255)  # [H, W] or [H, W, 3]
    return np.ascontiguousarray(np.moveaxis(levels.reshape(height, width, -1), -1, 0))


def _resized(image: Image, mode: str, height: int, width: int) -> Image:
    from PIL import Image

    # Modes that Pillow cannot resize by a filter are converted first.
    image = image if image.mode in ("RGB", "L", "RGBA") else image.convert(mode)
    return image.resize((width, height), Image.Resampling.LANCZOS).convert(mode)
