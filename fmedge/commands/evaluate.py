"""`fmedge eval`: how well pictures follow their captions."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from fmedge_runtimes.errors import BackendError, DataError, RequestError, SourceError

from fmedge.commands.console import progress_bar

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from fmedge.caption_accuracy import Accuracy, CaptionAccuracy, Painter

EPILOG = """
[bold]Examples[/bold]

  fmedge eval out/bundle

  fmedge eval out/model --per-combination 5 --seed 1 --steps 8 --json

  fmedge eval pictures/
"""


def command(
    source: Annotated[
        Path,
        typer.Argument(
            help="An image bundle, the folder of a trained text-to-image model (with torch), or a folder of pictures "
            "with captions, as `fmedge train image --data` takes them."
        ),
    ],
    per_combination: Annotated[int, typer.Option(min=1, help="Pictures of each of the 180 captions.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Of the first picture; the next ones count up.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of a picture; the model's own without it.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; the model's own without it.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures made together.")] = 60,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON line.")] = False,
) -> None:
    """Say how many pictures show what their captions say: size, colour, shape and position of the built-in captions.

    A rule reads the pictures; it is right for every picture that the training data draws. Combinations that
    `fmedge train image` never sees are counted apart.
    """
    painted = {"--steps": steps, "--guidance": guidance}
    if (source / "fmedge.json").is_file():
        accuracy = _of_painter(_bundle_painter(source, steps, guidance), per_combination, seed, batch)
    elif (source / "model_index.json").is_file():
        accuracy = _of_painter(_folder_painter(source, steps, guidance), per_combination, seed, batch)
    elif source.is_dir():
        given = [name for name, value in painted.items() if value is not None]
        if given:
            raise RequestError(f"{given[0]} is for models; the pictures of {source} are there already.")
        accuracy = _of_pictures(source)
    else:
        raise SourceError(f"{source}: there is no such folder; name a bundle, a model's folder, or one of pictures.")
    if as_json:
        from dataclasses import asdict

        typer.echo(json.dumps({"source": str(source), **asdict(accuracy)}))
    else:
        _show(accuracy)


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


def _show(accuracy: CaptionAccuracy) -> None:
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
