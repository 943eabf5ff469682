"""Pictures side by side in one PNG, for a person to look at."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

COLUMNS = 5
GAP = 2
LEAST_SIDE = 96
"""Smaller pictures are enlarged, so that a grid of them can be seen."""


def grid_from_pictures(pictures: Sequence[NDArray[np.uint8]]) -> Image.Image:
    """Lay pictures [S, S, 3] of one size out in rows of COLUMNS, separated by grey lines."""
    side = pictures[0].shape[0]
    rows, columns = math.ceil(len(pictures) / COLUMNS), min(len(pictures), COLUMNS)
    step = side + GAP
    grid = np.full((rows * step + GAP, columns * step + GAP, 3), 160, np.uint8)
    for number, picture in enumerate(pictures):
        row, column = divmod(number, COLUMNS)
        top, left = GAP + row * step, GAP + column * step
        grid[top : top + side, left : left + side] = picture
    image = Image.fromarray(grid)
    scale = math.ceil(LEAST_SIDE / side)
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
