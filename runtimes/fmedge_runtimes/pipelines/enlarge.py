"""Images made larger for a denoiser that adds the detail, as torch's `interpolate` makes them.

Both are linear in each axis: a matrix [to, from] for the rows, and one for the columns.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fmedge_runtimes.pipelines.pipeline import Array

Matrix = npt.NDArray[np.float32]
SHARPNESS = -0.5
"""Of the cubic that is used where shrinking would alias, Keys 1981; torch takes it with antialias."""


def bilinear(images: Array, height: int, width: int) -> Array:
    """Images [B, C, height, width], of which corner pixels are corner pixels of the given ones [B, C, h, w]."""
    return _both(images, _linear(images.shape[2], height), _linear(images.shape[3], width))


def bicubic(images: Array, height: int, width: int) -> Array:
    """Images [B, C, height, width], by the cubic of four neighbours that does not alias."""
    return _both(images, _cubic(images.shape[2], height), _cubic(images.shape[3], width))


def _both(images: Array, rows: Matrix, columns: Matrix) -> Array:
    found: Array = np.ascontiguousarray(rows @ (images @ columns.T), np.float32)
    return found


def _linear(old: int, new: int) -> Matrix:
    # In float32, as torch has it: of a place only the distance to its left neighbour is left in the end.
    step = np.float32((old - 1) / (new - 1) if new > 1 else 0.0)
    places = np.arange(new, dtype=np.float32) * step
    left = np.minimum(places.astype(np.int64), old - 1)
    share = places - left.astype(np.float32)
    matrix = np.zeros((new, old), np.float32)
    matrix[np.arange(new), left] += np.float32(1) - share
    matrix[np.arange(new), np.minimum(left + 1, old - 1)] += share
    return matrix


def _cubic(old: int, new: int) -> Matrix:
    scale = old / new
    reach = max(scale, 1.0)
    middles = (np.arange(new) + 0.5) * scale  # [new]
    distance = (np.arange(old) + 0.5 - middles[:, None]) / reach  # [new, old]
    weights = _keys(np.abs(distance))
    # At the edges there are fewer pixels.
    matrix: Matrix = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return matrix


def _keys(distance: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    a, d = SHARPNESS, distance
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = (((d - 5) * d + 8) * d - 4) * a
    return np.where(d < 1, near, np.where(d < 2, far, 0.0))
