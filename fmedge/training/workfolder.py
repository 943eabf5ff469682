"""OUTPUT.training, the folder beside the output where a run keeps what it needs to go on.

    run.json          the options and facts of the run; written last, so that it means "prepared"
    *.npy             what to train on and to measure with: tokens, or pictures and their captions' tokens
    tokenizer/        the tokenizer's files, as they will stand in the output
    checkpoints/      one that is written to its end has a complete.json
    samples/          of text-to-image: a grid of pictures every so often
    model/            the output while it is written

The output itself appears by one rename, so that a run killed at any moment leaves none that is
incomplete. What is renamed or declared complete was flushed to the disk before.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fmedge_runtimes.errors import TrainingError
from numpy.typing import NDArray

FORMAT = 1
COMPLETE = "complete.json"
REPORT = "training.json"
"""In the output: the options, the data and the results of the run that made it."""
MODEL_FILES = ("config.json", "model_index.json")
"""One of them makes a folder a model's: of transformers, of diffusers."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint written to its end."""

    path: Path
    seconds: float
    """Training time until it."""


@dataclass(frozen=True, slots=True)
class WorkFolder:
    """The paths of one run, and the steps that must not be torn apart by a kill."""

    output: Path

    @property
    def path(self) -> Path:
        """The folder itself."""
        return self.output.with_name(self.output.name + ".training")

    @property
    def checkpoints(self) -> Path:
        """Where a run's checkpoints are, each as checkpoint-STEP."""
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        """Where a text-to-image run leaves its grids."""
        return self.path / "samples"

    @property
    def model(self) -> Path:
        """The output while it is written."""
        return self.path / "model"

    def check(self, *, resume: bool, force: bool) -> None:
        """Refuse to overwrite or to continue what is not there, before any work."""
        if not self.output.name:
            raise TrainingError(f"{self.output}: name a folder to write")
        try:
            self.output.absolute().parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(f"{self.output.parent}: cannot hold {self.output.name}: {error.strerror}") from error
        if self.output.exists() and not force:
            raise TrainingError(f"{self.output}: exists already: replace it with --force or name another folder")
        if self.output.exists() and not _is_replaceable(self.output):
            raise TrainingError(f"{self.output}: --force replaces a model's folder only, and this is none")
        if resume and not self.path.is_dir():
            raise TrainingError(f"{self.path}: there is no interrupted run to resume: leave --resume out")
        if not resume and not force and self.path.exists():
            raise TrainingError(
                f"{self.path}: holds an interrupted run: continue it with --resume or discard it with --force"
            )

    @contextlib.contextmanager
    def claimed(self, *, resume: bool) -> Iterator[None]:
        """Keep a second run out while this one works; without `resume`, begin with an empty folder."""
        self.path.mkdir(exist_ok=True)
        with (self.path / "lock").open("w") as lock:
            if sys.platform != "win32":  # Windows has no flock: two runs there are the user's to avoid.
                import fcntl

                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise TrainingError(f"{self.path}: another run is using it: wait for its end") from error
            if not resume:
                self._clear()
            yield

    def discard(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.path)

    def _clear(self) -> None:
        # run.json first: without it, what a kill leaves here is not taken for a prepared run.
        (self.path / "run.json").unlink(missing_ok=True)
        for entry in self.path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != "lock":
                entry.unlink()

    def write_preparation(
        self,
        record: dict[str, object],
        tokenizer_files: dict[str, bytes],
        arrays: Mapping[str, NDArray[Any]],
    ) -> None:
        """Keep what was read, so that a resumed run trains on the very same data."""
        for name, array in arrays.items():
            np.save(self.path / f"{name}.npy", array)
        folder = self.path / "tokenizer"
        folder.mkdir(exist_ok=True)
        for name, data in tokenizer_files.items():
            (folder / name).write_bytes(data)
        _flush(self.path)
        _write_json(self.path / "run.json", {"format": FORMAT, **record})

    def read_record(self) -> dict[str, Any] | None:
        """What write_preparation was given, or None where it did not come to its end."""
        try:
            text = (self.path / "run.json").read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        record: dict[str, Any] = json.loads(text)
        if record.pop("format") != FORMAT:
            raise TrainingError(
                f"{self.path}: was begun by another version of fmedge: finish it there, or discard it with --force"
            )
        return record

    def read_array(self, name: str) -> NDArray[Any]:
        """An array of the preparation, mapped rather than read."""
        array: NDArray[Any] = np.load(self.path / f"{name}.npy", mmap_mode="r")
        return array

    def complete_checkpoint(self, step: int, seconds: float) -> None:
        """Declare a checkpoint written to its end."""
        folder = self.checkpoints / f"checkpoint-{step}"
        _flush(folder)
        _write_json(folder / COMPLETE, {"seconds": seconds})

    def drop_torn_checkpoints(self) -> None:
        """Delete what a kill left half written, before a new checkpoint of the same name mixes with it."""
        for folder in self.checkpoints.glob("checkpoint-*"):
            if not (folder / COMPLETE).is_file():
                shutil.rmtree(folder)

    def last_checkpoint(self) -> Checkpoint | None:
        """The newest complete checkpoint."""
        complete = [file.parent for file in self.checkpoints.glob(f"checkpoint-*/{COMPLETE}")]
        if not complete:
            return None
        path = max(complete, key=step_of)
        return Checkpoint(path, json.loads((path / COMPLETE).read_text(encoding="utf-8"))["seconds"])

    def drop_old_checkpoints(self, kept: int) -> None:
        """Delete all but the newest checkpoints."""
        for folder in sorted(self.checkpoints.glob("checkpoint-*"), key=step_of)[:-kept]:
            shutil.rmtree(folder)

    def copy_tokenizer(self, folder: Path) -> None:
        """Put the tokenizer's files into a folder of the model, or into the model's own."""
        shutil.copytree(self.path / "tokenizer", folder, dirs_exist_ok=True)

    def write_report(self, report: dict[str, object]) -> None:
        """Complete the model with how it was made."""
        _write_json(self.model / REPORT, {"format": FORMAT, **report})

    def publish(self) -> None:
        """Let the output appear, complete, and remove this folder."""
        _flush(self.model)
        replaced = self.path / "replaced"
        if self.output.exists():
            self.output.rename(replaced)
        self.model.rename(self.output)
        _flush_entry(self.output.parent)
        self.discard()


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def _is_replaceable(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    return any((folder / name).is_file() for name in MODEL_FILES) or not any(folder.iterdir())


def _write_json(file: Path, content: dict[str, object]) -> None:
    """Write all of it or none of it."""
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _flush_entry(temporary)
    temporary.replace(file)
    _flush_entry(file.parent)


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        _flush_entry(path)
    _flush_entry(folder)


def _flush_entry(path: Path) -> None:
    if sys.platform == "win32":  # Windows flushes only what is open for writing, and no folder.
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
