"""Text-to-image training, from pictures with captions to an ordinary diffusers folder.

    from fmedge.training.image import ImageTraining, train_image

    result = train_image(ImageTraining(output=Path("model"), minutes=4))

Runs of --steps are reproducible and runs of --minutes are not, as those of `fmedge.training.text`.

This module imports what is heavy inside the functions that need it.
"""

from __future__ import annotations

import dataclasses
import math
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fmedge_runtimes.errors import TrainingError
from fmedge_runtimes.version import __version__

from fmedge.training.image_presets import image_preset_named
from fmedge.training.progress import Report, no_report
from fmedge.training.run import carry_out, require_packages, settled
from fmedge.training.run_options import check_options
from fmedge.training.schedule import Budget, CheckpointInterval

if TYPE_CHECKING:
    from fmedge.training.diffusion import Diffused
    from fmedge.training.image_preparation import ImagePreparation
    from fmedge.training.workfolder import WorkFolder

ObjectiveName = Literal["flow-x", "flow-v", "ddpm-epsilon", "ddpm-v"]


@dataclass(frozen=True, slots=True)
class ImageTraining:
    """The options of a run. None means: what the preset says."""

    output: Path
    data: Path | None = None
    """A folder of pictures with captions; None: the built-in shapes."""
    size: int = 32
    """Of the pictures' sides, in pixels."""
    objective: ObjectiveName = "flow-x"
    """What the model predicts; `fmedge.training.objectives` explains them."""
    preset: str = "tiny"
    minutes: float | None = None
    steps: int | None = None
    batch: int | None = None
    """Pictures of one step on one device."""
    learning_rate: float | None = None
    caption_dropout: float = 0.1
    """The share of pictures whose caption is left out, so that guidance can be used."""
    ema: float = 0.98
    """What a step keeps of the average of the weights, which is the model that is written; 0: no average."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 0
    sample_minutes: float = 0.5
    """How often a grid of pictures is drawn; 0: at the end only."""
    checkpoint_minutes: float = 5.0
    checkpoint_steps: int | None = None
    resume: bool = False
    """Go on with an interrupted run of the same options; no file of theirs is read again."""
    force: bool = False
    """Replace the output, and discard an interrupted run unless it is resumed."""

    def __post_init__(self) -> None:
        """Refuse what no run can use."""
        Budget(self.steps, self.minutes)
        image_preset_named(self.preset)
        check_options(self, {"size": 1})
        for name in ("caption_dropout", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise TrainingError(f"--{name.replace('_', '-')} must be from 0 to less than 1")
        if not 0 <= self.sample_minutes < math.inf:
            raise TrainingError(f"--sample-minutes must be 0 or more, not {self.sample_minutes}")


@dataclass(frozen=True, slots=True)
class ImageTrainingResult:
    """What a run made, and how well and how fast."""

    output: Path
    parameters: int
    vocabulary: int
    train_pictures: int
    validation_pictures: int
    captions_cut: int
    """Captions that are longer than the model reads."""
    steps: int
    pictures_seen: int
    seconds: float
    """Of training, without preparing and measuring; interruptions are not counted."""
    pictures_per_second: float
    loss_before: float
    loss_after: float
    """The objective's, on the held-out pictures; comparable only between runs of one objective."""
    precision: str
    device: str
    devices: int


def train_image(options: ImageTraining, progress: Report | None = None) -> ImageTrainingResult:
    """Train, and write the output. Under torchrun every process calls this with the same options."""
    require_packages("torch", "transformers", "diffusers", "accelerate")
    return carry_out(options, progress or no_report, _prepare, _train)


def _prepare(options: ImageTraining, work: WorkFolder, report: Report) -> None:
    from fmedge.training.image_preparation import prepare_images
    from fmedge.training.quiet import quiet

    with quiet():
        prepare_images(options, work, report)


def _train(options: ImageTraining, work: WorkFolder, report: Report) -> ImageTrainingResult:
    """Train what was prepared, and write all of the output but its name."""
    from fmedge.training.device import processes
    from fmedge.training.diffusion import DiffusionTraining, diffuse
    from fmedge.training.image_preparation import ImagePreparation

    processes().wait_for_everyone()
    preparation = ImagePreparation(**settled(work))
    training = DiffusionTraining(
        preset=image_preset_named(options.preset),
        objective=options.objective,
        vocabulary=preparation.vocabulary,
        start=preparation.start,
        end=preparation.end,
        length=preparation.length,
        size=preparation.size,
        budget=Budget(options.steps, options.minutes),
        batch=preparation.batch,
        learning_rate=preparation.learning_rate,
        caption_dropout=options.caption_dropout,
        ema=options.ema,
        seed=options.seed,
        precision=None if options.precision == "auto" else options.precision,
        sample_captions=tuple(preparation.sample_captions),
    )
    interval = CheckpointInterval(options.checkpoint_minutes, options.checkpoint_steps)
    diffused = diffuse(training, work, interval, options.sample_minutes or math.inf, report)
    result = _result(options, preparation, diffused)
    if processes().is_main_process:
        work.write_report(_report_from_run(preparation, result))
    return result


def _result(options: ImageTraining, preparation: ImagePreparation, diffused: Diffused) -> ImageTrainingResult:
    return ImageTrainingResult(
        output=options.output,
        parameters=diffused.parameters,
        vocabulary=preparation.vocabulary,
        train_pictures=preparation.train_pictures,
        validation_pictures=preparation.validation_pictures,
        captions_cut=preparation.captions_cut,
        steps=diffused.steps,
        pictures_seen=diffused.pictures_seen,
        seconds=diffused.seconds,
        pictures_per_second=diffused.pictures_seen / diffused.seconds,
        loss_before=diffused.loss_before,
        loss_after=diffused.loss_after,
        precision=diffused.precision,
        device=diffused.device,
        devices=diffused.devices,
    )


def _report_from_run(preparation: ImagePreparation, result: ImageTrainingResult) -> dict[str, object]:
    """What training.json says."""
    return {
        "versions": {
            "fmedge": __version__,
            "python": platform.python_version(),
            "torch": version("torch"),
            "transformers": version("transformers"),
            "diffusers": version("diffusers"),
        },
        "options": {
            **preparation.options,
            "batch": preparation.batch,
            "learning_rate": preparation.learning_rate,
        },
        "pictures": {"sha256": preparation.sha256},
        "result": {name: value for name, value in dataclasses.asdict(result).items() if name != "output"},
    }
