"""What `fmedge generate` does with a bundle that makes images: prompts to PNG files, a grid, and JSON lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import typer
from fmedge_runtimes.diffusion import Diffusion, checked
from fmedge_runtimes.errors import RequestError
from fmedge_runtimes.generated_image import (
    OWN_CHUNK,
    GeneratedImage,
    ImageUpdate,
    png,
    settings_json,
    sheet_of,
)
from fmedge_runtimes.image import ImageModel
from fmedge_runtimes.load import load_image
from fmedge_runtimes.parts import MODES

from fmedge.commands.call import Call
from fmedge.commands.console import progress_bar
from fmedge.commands.png_file import PNG, check_places, is_png, write_png
from fmedge.commands.previews import Previews, preview_place
from fmedge.commands.prompts import LineFields, PromptLine, read_prompts

FIELDS = LineFields(frozenset({"negative", "seed"}), checked, messages=False)
"""What a line of a .jsonl file may say for its prompt alone."""
STDOUT = "-"
OTHER_FILES = frozenset({".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".json", ".jsonl"})
"""Endings by which a file is meant, of a kind that is not written."""


@dataclass(frozen=True, slots=True)
class Destination:
    """Where images go."""

    output: str | None
    """A PNG for a single image, a folder, or - for a single image on stdout."""
    grid: Path | None
    """A PNG with all of them side by side."""
    force: bool
    """Whether files that are there may be replaced."""
    as_json: bool
    previews: Previews | None = None

    def check(self, count: int) -> None:
        """Raise a usage error if so many images cannot go there, RequestError if a file is in the way."""
        if self.output is None and self.grid is None:
            raise typer.BadParameter("images need a place: --output FILE.png or FOLDER, or --grid FILE.png.")
        if self.output == STDOUT and (count > 1 or self.as_json):
            raise typer.BadParameter("--output - is for a single image, without --json.")
        if self.output is not None and (not self.output or Path(self.output).suffix.lower() in OTHER_FILES):
            raise typer.BadParameter(f"--output is {self.output!r}; images are written to a .png file or a folder.")
        if self.grid is not None and self.grid.suffix.lower() != PNG:
            raise typer.BadParameter(f"--grid is {self.grid}; it must be a .png file.")
        if self.output is not None and is_png(self.output) and count > 1:
            raise typer.BadParameter(f"--output {self.output} is one file for {count} images; give a folder.")
        files = [path for number in range(count) if (path := self.file(number)) is not None]
        if self.grid is not None and self.grid.absolute() in (path.absolute() for path in files):
            raise typer.BadParameter(f"--output and --grid are both {self.grid}; give the grid a place of its own.")
        files += [] if self.grid is None else [self.grid]
        # Found out now, not when the images are ready.
        check_places(files, force=self.force)
        if self.previews is not None:
            place = self.previews.place.absolute()
            if place in (path.absolute() for path in files):
                raise typer.BadParameter(f"--preview is {self.previews.place}, where images go; give another place.")
            self.previews.check(count)

    def file(self, number: int) -> Path | None:
        """The file of an image; None if it is not written to one of its own."""
        if self.output in (None, STDOUT):
            return None
        path = Path(str(self.output))
        return path if is_png(str(self.output)) else path / f"{number:05}.png"


def generate_images(
    call: Call, options: Diffusion, *, grid: Path | None, preview: Path | None, memory_mode: str | None
) -> None:
    """Make images of all prompts. Raises a usage error for options that contradict each other, and FmedgeError."""
    lines = read_prompts(call.prompts, call.source, FIELDS)
    place = preview_place(preview, options.preview_every, call.output)
    previews = None if place is None else Previews(place, call.force)
    destination = Destination(call.output, grid, call.force, call.as_json, previews)
    destination.check(len(lines) * options.n)
    mode = next((mode for mode in MODES if mode == (memory_mode or MODES[0])), None)
    if mode is None:
        raise typer.BadParameter(f"--memory-mode is {memory_mode!r}; it must be one of {', '.join(MODES)}.")
    with (
        progress_bar() as report,
        load_image(
            call.bundle,
            device=call.device,
            max_batch=call.max_batch,
            memory=call.memory,
            memory_mode=mode,
            threads=call.threads,
        ) as model,
    ):
        write_images(model, lines, options, destination, report)


def write_images(
    model: ImageModel,
    lines: Sequence[PromptLine],
    base: Diffusion,
    destination: Destination,
    report: Callable[[str, int, int], None],
) -> None:
    """Make the images of all prompts and write each as it is ready. Raises FmedgeError."""
    negatives = tuple(line.overrides.get("negative", base.negative_of(0)) for line in lines)
    options = replace(
        base,
        # A pipeline that knows no negative prompts must not be told that there is none.
        negative=negatives if any(negative is not None for negative in negatives) else None,
        seed=tuple(line.overrides.get("seed", base.seed_of(0)) for line in lines),
    )
    prompts = [_text(line) for line in lines]
    total = len(lines) * options.n
    shown: dict[int, GeneratedImage] = {}
    for update in model.stream(prompts, options):
        for image in update.finished:
            number = image.prompt_index * options.n + image.index
            path = destination.file(number)
            _write(path, image.png(), is_stdout=destination.output == STDOUT)
            if destination.as_json:
                typer.echo(_json(image, lines[image.prompt_index], path))
            elif path is not None:
                typer.echo(path)
            if destination.grid is not None:
                shown[number] = image
        if destination.previews is not None:
            destination.previews.write(update)
        _report(update, total, report)
    if destination.grid is not None:
        _write(destination.grid, grid_png([shown[number] for number in sorted(shown)], options.n), is_stdout=False)
        if destination.output is None and not destination.as_json:
            typer.echo(destination.grid)


def _text(line: PromptLine) -> str:
    if not isinstance(line.prompt, str):
        raise RequestError(f"{line.where}: images are made of texts, not of token ids.")
    return line.prompt


def _report(update: ImageUpdate, total: int, report: Callable[[str, int, int], None]) -> None:
    numbers = sorted(update.images)
    which = f" {numbers[0] + 1}-{numbers[-1] + 1} of {total}" if numbers else ""
    report(f"{update.stage}{which}", update.done, update.total)


def grid_png(images: Sequence[GeneratedImage], columns: int) -> bytes:
    """All images as one PNG, the images of a prompt in a row if there are several."""
    sheet = sheet_of([image.image for image in images], columns if columns > 1 else None)
    return png(sheet, {OWN_CHUNK: json.dumps([json.loads(settings_json(image.settings)) for image in images])})


def _write(path: Path | None, content: bytes, *, is_stdout: bool) -> None:
    if path is not None:
        write_png(path, content)
    elif is_stdout:
        try:
            sys.stdout.buffer.write(content)
        except OSError as error:
            raise RequestError(f"cannot write to stdout: {error.strerror}.") from error


def _json(image: GeneratedImage, line: PromptLine, path: Path | None) -> str:
    record = {} if line.id is None else {"id": line.id}
    facts = {
        "file": None if path is None else str(path),
        "prompt_index": image.prompt_index,
        "index": image.index,
        **asdict(image.settings),
        "stats": {**asdict(image.stats), "seconds": image.stats.seconds},
    }
    return json.dumps({**record, **facts}, ensure_ascii=False)
