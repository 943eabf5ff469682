"""Captioned shapes on white: the built-in data of `fmedge train image`, and the rule that judges pictures of them.

A caption is `a {small|large} {colour} {shape} in the {position}`. A fifth of the 180 combinations is never
trained on: those whose four indices add up to a multiple of five. Every size, colour and shape is therefore seen
together, and every pair of attributes, but each of them in four of the five positions only.

    picture = draw(COMBINATIONS[0], 32, np.random.default_rng(7))  # uint8 [32, 32, 3]
    assert detect(picture) == COMBINATIONS[0]
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

SIZES: Mapping[str, float] = MappingProxyType({"small": 0.11, "large": 0.2})
"""Half of a figure's extent, as a share of the picture's side."""
COLOURS: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {
        "red": (220, 40, 40),
        "green": (40, 160, 60),
        "blue": (40, 80, 220),
        "yellow": (240, 205, 40),
        "purple": (140, 60, 180),
        "orange": (250, 130, 30),
    }
)
POSITIONS: Mapping[str, tuple[float, float]] = MappingProxyType(
    {"left": (0.25, 0.5), "right": (0.75, 0.5), "top": (0.5, 0.25), "bottom": (0.5, 0.75), "center": (0.5, 0.5)}
)
"""The middle of a figure (x, y), as shares of the picture's side."""

SIZE_JITTER, POSITION_JITTER, COLOUR_JITTER = 0.08, 0.025, 12
"""At most so much is added or taken away: of the extent, of the picture's side, of 255."""
SMALLEST_SIDE = 24
"""Below this no pixel shows the colour of a small triangle."""

WHITE = 255.0
BACKGROUND = 0.15
"""What covers a pixel less than this is noise."""
LEAST_OVERLAP = 0.8
"""Of a figure with the shape it is taken for. Two of a shape overlap by 0.95 and more; circle and square of one area
by 0.9, circle and triangle by 0.7."""
FARTHEST_COLOUR = 90.0
"""From a colour of the table, in RGB. The two nearest of the table are 76 apart."""
EXTENT_BORDER = math.sqrt(SIZES["small"] * SIZES["large"])
FARTHEST_POSITION = 0.125
"""Half the way between two positions."""


@dataclass(frozen=True, slots=True)
class Combination:
    """What a caption says."""

    size: str
    colour: str
    shape: str
    position: str

    @property
    def caption(self) -> str:
        """In words."""
        return f"a {self.size} {self.colour} {self.shape} in the {self.position}"


@dataclass(frozen=True, slots=True)
class Detection:
    """What a picture shows; None where that is none of the captions' words."""

    size: str | None
    colour: str | None
    shape: str | None
    position: str | None


ATTRIBUTES = ("size", "colour", "shape", "position")
NOTHING = Detection(None, None, None, None)


@dataclass(frozen=True, slots=True)
class Shape:
    """A figure of extent 1 around the origin, y downwards."""

    distance: Callable[[NDArray[np.float32], NDArray[np.float32]], NDArray[np.float32]]
    """From (x, y) to its outline, negative inside; exact near the straight parts of the outline."""
    area: float
    centroid: float
    """Its y; x is 0."""


def _circle(x: NDArray[np.float32], y: NDArray[np.float32]) -> NDArray[np.float32]:
    distance: NDArray[np.float32] = np.hypot(x, y) - np.float32(1)
    return distance


def _square(x: NDArray[np.float32], y: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.maximum(np.abs(x), np.abs(y)) - np.float32(SQUARE)


def _triangle(x: NDArray[np.float32], y: NDArray[np.float32]) -> NDArray[np.float32]:
    side = (2 * np.abs(x) - y - 1) / np.float32(math.sqrt(5))  # From (0, -1) to (1, 1).
    distance: NDArray[np.float32] = np.maximum(side, y - np.float32(1))
    return distance


SQUARE = 0.9
SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "circle": Shape(_circle, math.pi, 0.0),
        "square": Shape(_square, 4 * SQUARE**2, 0.0),
        "triangle": Shape(_triangle, 2.0, 1 / 3),
    }
)

COMBINATIONS = tuple(Combination(*words) for words in itertools.product(SIZES, COLOURS, SHAPES, POSITIONS))
_INDICES = itertools.product(range(len(SIZES)), range(len(COLOURS)), range(len(SHAPES)), range(len(POSITIONS)))
HELD_OUT = tuple(one for one, indices in zip(COMBINATIONS, _INDICES, strict=True) if sum(indices) % 5 == 0)
SEEN = tuple(one for one in COMBINATIONS if one not in HELD_OUT)
_BY_CAPTION = {one.caption: one for one in COMBINATIONS}


def combination_from_caption(caption: str) -> Combination | None:
    """Read a caption, whatever its case and spaces; None if it is none of the 180."""
    return _BY_CAPTION.get(" ".join(caption.lower().split()))


def draw(combination: Combination, side: int, random: np.random.Generator) -> NDArray[np.uint8]:
    """Draw a combination as [side, side, 3], anti-aliased; size, place and colour vary a little with `random`."""
    extent = SIZES[combination.size] * side * (1 + random.uniform(-SIZE_JITTER, SIZE_JITTER))
    middle = (np.array(POSITIONS[combination.position]) + random.uniform(-POSITION_JITTER, POSITION_JITTER, 2)) * side
    colour = np.array(COLOURS[combination.colour]) + random.uniform(-COLOUR_JITTER, COLOUR_JITTER, 3)
    coverage = _coverage(SHAPES[combination.shape], side, extent, middle[0], middle[1])[:, :, None]  # [S, S, 1]
    return np.rint(np.clip(WHITE + (colour - WHITE) * coverage, 0, WHITE)).astype(np.uint8)


def _coverage(shape: Shape, side: int, extent: float, x: float, y: float) -> NDArray[np.float32]:
    """How much of each pixel a shape covers, [side, side]."""
    pixels = np.arange(side, dtype=np.float32) + np.float32(0.5)
    columns, rows = np.meshgrid((pixels - np.float32(x)) / extent, (pixels - np.float32(y)) / extent)
    covered: NDArray[np.float32] = np.clip(0.5 - extent * shape.distance(columns, rows), 0, 1, dtype=np.float32)
    return covered


def detect(picture: NDArray[np.uint8]) -> Detection:
    """Say what a picture [H, W, 3] shows.

    The figure is what differs from white. Its colour is the nearest of the table. Its shape is the one that, drawn with
    the same area and centroid, overlaps it most; pieces elsewhere count against it. That shape's extent and middle
    give size and position.
    """
    side = picture.shape[0]
    ink = WHITE - picture.astype(np.float32)  # [H, W, 3]
    darkness = ink.max(axis=2)
    core = darkness > 0.6 * darkness.max()
    if darkness.max() < BACKGROUND * WHITE:
        return NOTHING
    colour = np.median(ink[core], axis=0)  # [3]
    figure = np.clip(ink @ colour / (colour @ colour), 0, 1)
    figure[figure < BACKGROUND] = 0
    area = float(figure.sum())
    rows, columns = np.indices(figure.shape, dtype=np.float32) + np.float32(0.5)
    x, y = float((columns * figure).sum()) / area, float((rows * figure).sum()) / area
    fits = {name: _fit(figure, shape, area, x, y) for name, shape in SHAPES.items()}
    best = max(fits, key=lambda name: fits[name])
    if fits[best] < LEAST_OVERLAP:
        return Detection(None, _nearest_colour(WHITE - colour), None, None)
    extent = math.sqrt(area / SHAPES[best].area)
    y -= SHAPES[best].centroid * extent
    return Detection(
        size=_size(extent / side),
        colour=_nearest_colour(WHITE - colour),
        shape=best,
        position=_nearest_position(x / side, y / side),
    )


def _fit(figure: NDArray[np.float32], shape: Shape, area: float, x: float, y: float) -> float:
    """The overlap with a shape of this area and centroid: intersection over union."""
    extent = math.sqrt(area / shape.area)
    ideal = _coverage(shape, figure.shape[0], extent, x, y - shape.centroid * extent)
    return float(np.minimum(figure, ideal).sum() / np.maximum(figure, ideal).sum())


def _size(extent: float) -> str | None:
    if not 0.7 * SIZES["small"] < extent < 1.3 * SIZES["large"]:
        return None
    return "small" if extent < EXTENT_BORDER else "large"


def _nearest_colour(colour: NDArray[np.float32]) -> str | None:
    distances = {name: float(np.linalg.norm(colour - np.array(known))) for name, known in COLOURS.items()}
    nearest = min(distances, key=lambda name: distances[name])
    return nearest if distances[nearest] < FARTHEST_COLOUR else None


def _nearest_position(x: float, y: float) -> str | None:
    distances = {name: math.dist((x, y), known) for name, known in POSITIONS.items()}
    nearest = min(distances, key=lambda name: distances[name])
    return nearest if distances[nearest] < FARTHEST_POSITION else None
