"""What comes before text-to-image training: pictures drawn or read, checked, split and written into the work folder."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from fmedge_runtimes.errors import TrainingError
from numpy.typing import NDArray

from fmedge.shapes import HELD_OUT, SEEN, SMALLEST_SIDE, Combination, draw
from fmedge.training.caption_tokenizer import train_caption_tokenizer
from fmedge.training.image_folder import CaptionedPictures, read_image_folder
from fmedge.training.image_presets import image_preset_named
from fmedge.training.progress import Progress, Report
from fmedge.training.run_options import deciding_options
from fmedge.training.workfolder import WorkFolder

if TYPE_CHECKING:
    from fmedge.training.image import ImageTraining

VARIANTS = 96
"""Pictures of each built-in combination."""
HELD_OUT_VARIANTS = 4
DRAWING_SEED = 20261124
"""The built-in pictures are the same whatever the run's seed, as those of a folder are."""
VALIDATION_SHARE, MOST_VALIDATION = 0.05, 256


@dataclass(frozen=True, slots=True)
class ImagePreparation:
    """What is settled before training; run.json holds it."""

    options: dict[str, Any]
    """Those that decide the result."""
    size: int
    batch: int
    learning_rate: float
    vocabulary: int
    start: int
    end: int
    length: int
    """Tokens of a caption."""
    train_pictures: int
    validation_pictures: int
    captions_cut: int
    """Captions whose end is beyond the tokens that a caption may have."""
    sample_captions: list[str]
    sha256: str
    """Of the pictures, the captions and their split."""


@dataclass(frozen=True, slots=True)
class _Split:
    """Pictures to train on, and pictures held out to measure with."""

    train: CaptionedPictures
    validation: CaptionedPictures
    samples: list[str]
    """Captions to draw grids of."""


def prepare_images(options: ImageTraining, work: WorkFolder, report: Report) -> None:
    """Settle the model, read and check the data, and write it into the work folder."""
    preset = image_preset_named(options.preset)
    size = options.size
    if size % preset.patch:
        raise TrainingError(f"--size must be a multiple of {preset.patch}, the side of a patch, not {size}")
    report(Progress("reading"))
    split = _built_in(size) if options.data is None else _from_folder(read_image_folder(options.data, size))
    report(Progress("tokenizing"))
    tokenizer = train_caption_tokenizer([*split.train.captions, *split.validation.captions])
    train_count = len(split.train.captions)
    arrays = {
        "pictures": split.train.pictures,  # uint8 [N, S, S, 3]
        "captions": tokenizer.tokens[:train_count],  # int32 [N, L]
        "validation_pictures": split.validation.pictures,
        "validation_captions": tokenizer.tokens[train_count:-1],
        "empty_caption": tokenizer.tokens[-1],  # int32 [L]
    }
    preparation = ImagePreparation(
        options=deciding_options(options),
        size=size,
        batch=options.batch or preset.batch,
        learning_rate=options.learning_rate or preset.learning_rate,
        vocabulary=tokenizer.vocabulary,
        start=tokenizer.start,
        end=tokenizer.end,
        length=tokenizer.length,
        train_pictures=train_count,
        validation_pictures=len(split.validation.captions),
        captions_cut=tokenizer.cut,
        sample_captions=split.samples,
        sha256=_sha256(split),
    )
    work.write_preparation(dataclasses.asdict(preparation), tokenizer.files, arrays)


def _built_in(size: int) -> _Split:
    if size < SMALLEST_SIDE:
        raise TrainingError(f"--size must be at least {SMALLEST_SIDE} for the built-in shapes, not {size}")
    random = np.random.default_rng(DRAWING_SEED)
    train = [one for one in SEEN for _ in range(VARIANTS)]
    validation = [one for one in HELD_OUT for _ in range(HELD_OUT_VARIANTS)]
    samples = [HELD_OUT[number].caption for number in range(0, len(HELD_OUT), 2)] + [SEEN[0].caption, SEEN[-1].caption]
    return _Split(_drawn(train, size, random), _drawn(validation, size, random), samples)


def _drawn(combinations: list[Combination], size: int, random: np.random.Generator) -> CaptionedPictures:
    pictures = np.stack([draw(one, size, random) for one in combinations])
    return CaptionedPictures(pictures, tuple(one.caption for one in combinations), ())


def _from_folder(found: CaptionedPictures) -> _Split:
    """Hold out the pictures whose bytes have the smallest hashes, whatever their names and order."""
    count = min(max(round(len(found.captions) * VALIDATION_SHARE), 1), MOST_VALIDATION)
    order = np.argsort([hashlib.sha256(picture.tobytes()).hexdigest() for picture in found.pictures], kind="stable")
    validation, train = order[:count], np.sort(order[count:])
    samples = sorted({found.captions[number] for number in order})[: 4 * 5]
    return _Split(_chosen(found, train), _chosen(found, validation), samples)


def _chosen(found: CaptionedPictures, numbers: NDArray[np.int64]) -> CaptionedPictures:
    return CaptionedPictures(found.pictures[numbers], tuple(found.captions[number] for number in numbers), ())


def _sha256(split: _Split) -> str:
    digest = hashlib.sha256()
    for part in (split.train, split.validation):
        digest.update(part.pictures.tobytes())
        digest.update("\n".join(part.captions).encode() + b"\0")
    return digest.hexdigest()
