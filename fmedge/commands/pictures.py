"""What `fmedge eval` does with what makes images: how many pictures follow their captions."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fmedge_runtimes.errors import BackendError, DataError, RequestError, SourceError

from fmedge.commands.console import progress_bar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fmedge.caption_accuracy import Accuracy, CaptionAccuracy, Painter


def judge_pictures(
    source: Path, *, per_combination: int, seed: int, steps: int | None, guidance: float | None, batch: int
) -> CaptionAccuracy:
    """Judge an image bundle, a trained folder, or a folder of pictures. Raises FmedgeError."""
    if (source / "fmedge.json").is_file():
        return _of_painter(_bundle_painter(source, steps, guidance), per_combination, seed, batch)
    if (source / "model_index.json").is_file():
        return _of_painter(_folder_painter(source, steps, guidance), per_combination, seed, batch)
    if not source.is_dir():
        raise SourceError(f"{source}: there is no such folder; name a bundle, a model's folder, or one of pictures.")
    given = [name for name, value in (("--steps", steps), ("--guidance", guidance)) if value is not None]
    if given:
        raise RequestError(f"{given[0]} is for models; the pictures of {source} are there already.")
    return _of_pictures(source)


def _of_painter(paint: Painter, per_combination: int, seed: int, batch: int) -> CaptionAccuracy:
    from fmedge.caption_accuracy import accuracy_of_painter

    with progress_bar() as bar:
        return accuracy_of_painter(
            paint,
            per_combination=per_combination,
            seed=seed,
            batch=batch,
            report=lambda done, total: bar("painting", done, total),
        )


def _bundle_painter(bundle: Path, steps: int | None, guidance: float | None) -> Painter:
    import numpy as np

    import fmedge

    model = fmedge.load_image(bundle)

    def paint(captions: Sequence[str], seeds: Sequence[int]) -> list[NDArray[np.uint8]]:
        made = model.generate(list(captions), fmedge.Diffusion(steps=steps, guidance=guidance, seed=tuple(seeds)))
        return [np.asarray(one.image.convert("RGB")) for one in made]

    return paint


def _folder_painter(folder: Path, steps: int | None, guidance: float | None) -> Painter:
    from importlib.util import find_spec

    missing = [name for name in ("torch", "transformers", "diffusers") if find_spec(name) is None]
    if missing:
        raise BackendError(
            f"{folder}: is no bundle, and a model's folder needs {', '.join(missing)}: pip install 'fmedge[export]'."
        )
    from fmedge.training.torch_painter import painter_from_folder

    return painter_from_folder(folder, steps, guidance)


def _of_pictures(folder: Path) -> CaptionAccuracy:
    from fmedge.caption_accuracy import Judged, accuracy_of_judged
    from fmedge.shapes import SMALLEST_SIDE, combination_from_caption, detect
    from fmedge.training.image_folder import read_image_folder

    found = read_image_folder(folder, side=None)
    side = found.pictures.shape[1]
    if side < SMALLEST_SIDE:
        raise DataError(f"{folder}: its pictures are {side} pixels wide; the rules need at least {SMALLEST_SIDE}.")
    combinations = [combination_from_caption(caption) for caption in found.captions]
    others = [name for name, one in zip(found.files, combinations, strict=True) if one is None]
    if others:
        raise DataError(
            f"{folder}: {len(others)} captions are none of the built-in ones, such as that of {others[0]}; only "
            "captions like `a small red circle in the left` can be judged."
        )
    known = [one for one in combinations if one is not None]
    return accuracy_of_judged(Judged(one, detect(it)) for one, it in zip(known, found.pictures, strict=True))


def show_pictures(accuracy: CaptionAccuracy) -> None:
    """Print what was found as a table."""
    from rich.console import Console
    from rich.table import Table

    from fmedge.shapes import ATTRIBUTES

    table = Table(caption="pictures that show what their caption says", caption_justify="left")
    table.add_column("combinations")
    for name in ("pictures", *ATTRIBUTES, "all"):
        table.add_column(name, justify="right")
    for name, one in (("seen in training", accuracy.seen), ("held out", accuracy.held_out)):
        if one is not None:
            table.add_row(name, *_cells(one))
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def _cells(accuracy: Accuracy) -> list[str]:
    shares = (accuracy.size, accuracy.colour, accuracy.shape, accuracy.position, accuracy.all)
    return [str(accuracy.pictures), *(f"{share:.1%}" for share in shares)]
