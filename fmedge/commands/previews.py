"""Previews of images while they are made, as files: `fmedge generate --preview-every`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import typer
from fmedge_runtimes.errors import RequestError
from fmedge_runtimes.generated_image import OWN_CHUNK, ImageUpdate, png

from fmedge.commands.png_file import PNG, check_places, is_png, write_png

NAMES = "[0-9][0-9][0-9][0-9][0-9]-[0-9][0-9][0-9][0-9].png"
"""Of previews in a folder."""


@dataclass(frozen=True, slots=True)
class Previews:
    """Where previews go. In a folder the file of an image's step is 00000-0005.png; one file shows the newest only."""

    place: Path
    force: bool
    """Whether files that are there may be replaced."""
    _before: dict[int, int] = field(default_factory=dict)
    """Of each image, the steps of the stages before the one that it is in."""
    _newest: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Of each image, the last step that was seen, and the number of that stage's steps."""

    def check(self, count: int) -> None:
        """Raise a usage error if previews of so many images cannot go there, RequestError if a file is in the way."""
        if self.is_file:
            if count > 1:
                raise typer.BadParameter(f"--preview {self.place} is one file for {count} images; give a folder.")
            check_places([self.place], force=self.force)
            return
        if self.place.suffix and self.place.suffix.lower() != PNG and not self.place.is_dir():
            raise typer.BadParameter(f"--preview is {self.place}; previews are written to a .png file or a folder.")
        check_places([self.place / "00000-0001.png"], force=True)
        there = min(self.place.glob(NAMES), default=None)
        if there is not None and not self.force:
            raise RequestError(f"{there} exists; replace previews with --force, or give another place.")

    @property
    def is_file(self) -> bool:
        """Whether there is one file, of a single image."""
        return is_png(str(self.place))

    def write(self, update: ImageUpdate) -> None:
        """Write what an update shows. Raises RequestError."""
        if update.stage != "denoise":
            return
        for image in update.images:
            last, total = self._newest.get(image, (0, 0))
            if update.done <= last:
                # A cascade's next stage: its steps count on, so that names sort.
                self._before[image] = self._before.get(image, 0) + total
            self._newest[image] = update.done, update.total
        for image, picture in zip(update.images, update.previews, strict=False):
            step = self._before.get(image, 0) + update.done
            path = self.place if self.is_file else self.place / f"{image:05}-{step:04}.png"
            facts = {"preview_of": image, "step": update.done, "steps": update.total}
            write_png(path, png(picture, {OWN_CHUNK: json.dumps(facts)}))


def preview_place(place: Path | None, every: int, output: str | None) -> Path | None:
    """Where previews go: where `--preview` says, else beside the output; None if none are asked for.

    Raises a usage error for options that contradict each other.
    """
    if not every:
        if place is not None:
            raise typer.BadParameter("--preview is the place of previews; say how often with --preview-every.")
        return None
    if place is not None:
        return place
    if output is None or output == "-":
        raise typer.BadParameter("--preview-every needs a place: --preview FOLDER or FILE.png.")
    path = Path(output)
    return path.with_name(f"{path.stem}-previews") if is_png(output) else path / "previews"
