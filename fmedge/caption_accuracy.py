"""How well pictures of the built-in captions follow them, judged by the rules of `fmedge.shapes`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fmedge.shapes import ATTRIBUTES, HELD_OUT, SEEN, Combination, Detection, detect

Painter = Callable[[Sequence[str], Sequence[int]], Sequence[NDArray[np.uint8]]]
"""Makes a picture [S, S, 3] of each caption, with the seed of the same place."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A picture's caption, and what the picture shows."""

    combination: Combination
    detection: Detection

    def follows(self, attribute: str) -> bool:
        """Whether an attribute is as the caption says."""
        return bool(getattr(self.combination, attribute) == getattr(self.detection, attribute))


@dataclass(frozen=True, slots=True)
class Accuracy:
    """The share of pictures that follow their caption."""

    pictures: int
    size: float
    colour: float
    shape: float
    position: float
    all: float
    """In every attribute."""


@dataclass(frozen=True, slots=True)
class CaptionAccuracy:
    """By whether training saw the combinations; None where there was no picture."""

    seen: Accuracy | None
    held_out: Accuracy | None


def accuracy_of_painter(
    paint: Painter, *, per_combination: int, seed: int, batch: int, report: Callable[[int, int], None]
) -> CaptionAccuracy:
    """Have every combination painted; each picture has a seed of its own, counted up from `seed`."""
    combinations = [one for one in (*SEEN, *HELD_OUT) for _ in range(per_combination)]
    return accuracy_of_judged(_painted(paint, combinations, seed, batch, report))


def _painted(
    paint: Painter, combinations: Sequence[Combination], seed: int, batch: int, report: Callable[[int, int], None]
) -> Iterator[Judged]:
    for start in range(0, len(combinations), batch):
        report(start, len(combinations))
        rows = combinations[start : start + batch]
        pictures = paint([one.caption for one in rows], range(seed + start, seed + start + len(rows)))
        for combination, picture in zip(rows, pictures, strict=True):
            yield Judged(combination, detect(picture))


def accuracy_of_judged(judged: Iterable[Judged]) -> CaptionAccuracy:
    """Sum up what was judged."""
    seen: list[Judged] = []
    held_out: list[Judged] = []
    for one in judged:
        (held_out if one.combination in HELD_OUT else seen).append(one)
    return CaptionAccuracy(_accuracy(seen), _accuracy(held_out))


def _accuracy(judged: Sequence[Judged]) -> Accuracy | None:
    if not judged:
        return None
    follows = np.array([[one.follows(attribute) for attribute in ATTRIBUTES] for one in judged])  # [N, 4]
    size, colour, shape, position = (float(share) for share in follows.mean(axis=0))
    return Accuracy(len(judged), size, colour, shape, position, float(follows.all(axis=1).mean()))
