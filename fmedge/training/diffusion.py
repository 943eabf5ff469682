"""Text-to-image training with accelerate: from prepared pictures to a diffusers folder.

What chance decides of a step comes from the seed and the step's number alone, so that a resumed run needs nothing but
weights, optimizer and average. Under torchrun every process runs all of this and rank 0 alone writes.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from fmedge_converters.pixel_pipeline import PixelDiffusionPipeline
from fmedge_runtimes.errors import DataError
from transformers import CLIPTokenizer

from fmedge.training.denoiser import Denoiser, pipeline_from_denoiser, write_pipeline
from fmedge.training.device import agreed, device_name, diverged, reproducible
from fmedge.training.image_presets import ImagePreset
from fmedge.training.objectives import OBJECTIVES
from fmedge.training.picture_batches import Batch, BatchOrder, read_pictures, train_batch, validation_batches
from fmedge.training.precision import Precision, best_precision
from fmedge.training.progress import Progress, Report
from fmedge.training.quiet import quiet, quiet_diffusers
from fmedge.training.sample_grid import grid_from_pictures
from fmedge.training.schedule import Budget, CheckpointInterval, Stopwatch, learning_rate_factor
from fmedge.training.workfolder import WorkFolder, step_of

ADAM_BETAS = (0.9, 0.95)
LARGEST_GRADIENT_NORM = 1.0
STEPS_PER_LOSS = 10
CHECKPOINTS_KEPT = 2
"""The last one, and the one before it while the last is being written."""
SAMPLE_SEED = 0
"""The same noise for every grid of a run, so that the grids can be compared."""


@dataclass(frozen=True, slots=True)
class DiffusionTraining:
    """All that decides how the model is trained, the pictures aside."""

    preset: ImagePreset
    objective: str
    vocabulary: int
    start: int
    end: int
    length: int
    size: int
    budget: Budget
    batch: int
    """Pictures of one step on one device."""
    learning_rate: float
    caption_dropout: float
    """The share of pictures whose caption is left out, for classifier-free guidance (Ho and Salimans 2022)."""
    ema: float
    """Of the average of the weights, what a step keeps; 0: there is no average."""
    seed: int
    precision: Precision | None
    """None: bfloat16 on a GPU that has it."""
    sample_captions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Diffused:
    """What a run came to."""

    parameters: int
    steps: int
    pictures_seen: int
    seconds: float
    loss_before: float
    loss_after: float
    precision: Precision
    device: str
    devices: int


def diffuse(
    training: DiffusionTraining,
    work: WorkFolder,
    interval: CheckpointInterval,
    sample_minutes: float,
    report: Report,
) -> Diffused:
    """Train from the last checkpoint or from the seed, and write the model into the work folder."""
    with quiet(), quiet_diffusers(), reproducible(training.budget):
        run = _Run(training, work, report)
        report(Progress("measuring"))
        loss_before = run.validation_loss()
        run.restore()
        run.train(interval, sample_minutes)
        seconds = run.seconds
        report(Progress("measuring", fraction=1.0))
        run.take_average()
        loss_after = run.validation_loss()
        if not math.isfinite(loss_after):
            raise diverged(run.step)
        report(Progress("writing", fraction=1.0))
        if run.accelerator.is_main_process:
            run.write()
        run.accelerator.wait_for_everyone()
    return Diffused(
        parameters=sum(parameter.numel() for parameter in run.denoiser.parameters()),
        steps=run.step,
        pictures_seen=run.step * run.pictures_per_step,
        seconds=seconds,
        loss_before=loss_before,
        loss_after=loss_after,
        precision="bfloat16" if run.accelerator.mixed_precision == "bf16" else "float32",
        device=device_name(run.accelerator.device),
        devices=run.accelerator.num_processes,
    )


class _Run:
    """The state of a run: weights, optimizer, average, and how far it is."""

    def __init__(self, training: DiffusionTraining, work: WorkFolder, report: Report) -> None:
        self.training = training
        self.work = work
        self.report = report
        self.objective = OBJECTIVES[training.objective]
        self.accelerator = _accelerator(training.precision)
        self.pictures = read_pictures(work)
        self.pictures_per_step = training.batch * self.accelerator.num_processes
        if len(self.pictures.train) < self.pictures_per_step:
            raise DataError(
                f"too few pictures: there are {len(self.pictures.train)} to train on, and one step takes "
                f"{self.pictures_per_step}: add pictures, or use a smaller --batch"
            )
        self.order = BatchOrder(
            pictures=len(self.pictures.train),
            batch=training.batch,
            processes=self.accelerator.num_processes,
            process=self.accelerator.process_index,
            seed=training.seed,
        )
        set_seed(training.seed)
        self.denoiser = Denoiser(
            training.preset,
            vocabulary=training.vocabulary,
            start=training.start,
            end=training.end,
            length=training.length,
        )
        optimizer = torch.optim.AdamW(
            self.denoiser.parameters(), lr=training.learning_rate, betas=ADAM_BETAS, weight_decay=0.0, fused=True
        )
        self.model, self.optimizer = self.accelerator.prepare(self.denoiser, optimizer)
        self.average = EMAModel(self.denoiser.parameters(), decay=training.ema, foreach=True)
        self.average.to(self.accelerator.device)
        self.accelerator.register_for_checkpointing(self.average)
        self.step = 0
        self.stopwatch = Stopwatch()
        self.seconds = 0.0
        """At the last step, and the same in every process: what is decided must be decided by all."""

    def restore(self) -> None:
        """Go on from the last checkpoint, if there is one."""
        with self.accelerator.main_process_first():
            if self.accelerator.is_main_process:
                self.work.drop_torn_checkpoints()
        checkpoint = self.work.last_checkpoint()
        if checkpoint is not None:
            self.accelerator.load_state(str(checkpoint.path))
            self.step = step_of(checkpoint.path)
            self.stopwatch = Stopwatch(before=checkpoint.seconds)
            self.seconds = checkpoint.seconds

    def train(self, interval: CheckpointInterval, sample_minutes: float) -> None:
        """Take steps until the budget is used up."""
        budget = self.training.budget
        saved_at = sampled_at = self.seconds
        losses: list[torch.Tensor] = []
        loss: float | None = None
        self.stopwatch.start()
        while (fraction := budget.fraction(self.step, self.seconds)) < 1:
            losses.append(self._take_step(learning_rate_factor(fraction)))
            self.step += 1
            self.seconds = agreed(self.stopwatch.seconds, self.accelerator.device)
            if self.step % STEPS_PER_LOSS == 0:
                loss = float(torch.stack(losses).mean())
                losses = []
                if not math.isfinite(loss):
                    raise diverged(self.step)
            fraction = budget.fraction(self.step, self.seconds)
            rate = self.step * self.pictures_per_step / self.seconds
            self.report(Progress("training", fraction, self.step, self.seconds, rate, loss))
            due_by_time = self.seconds - saved_at >= interval.minutes * 60
            due_by_steps = interval.steps is not None and self.step % interval.steps == 0
            if fraction < 1 and (due_by_time or due_by_steps):
                self._save()
                saved_at = self.seconds
            if fraction < 1 and self.seconds - sampled_at >= sample_minutes * 60:
                self._sample()
                sampled_at = self.seconds

    def _take_step(self, rate: float) -> torch.Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = self.training.learning_rate * rate
        batch = train_batch(
            self.pictures,
            self.order,
            self.step,
            self.objective,
            self.training.caption_dropout,
            self.accelerator.device,
        )
        loss = self._loss(batch)
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), LARGEST_GRADIENT_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.training.ema > 0:
            self.average.step(self.denoiser.parameters())
        return loss.detach()

    def _loss(self, batch: Batch) -> torch.Tensor:
        with self.accelerator.autocast():
            return self.objective.loss(
                lambda noisy, times: self.model(noisy, times, batch.captions), batch.clean, batch.draw
            )

    @torch.no_grad()
    def validation_loss(self) -> float:
        """The mean over the held-out pictures."""
        total = 0.0
        for batch in validation_batches(self.pictures, self.objective, self.accelerator.device):
            total += float(self._loss(batch)) * len(batch.clean)
        return total / len(self.pictures.validation)

    def take_average(self) -> None:
        """Put the average in the place of the weights, at the end."""
        if self.training.ema > 0:
            self.average.copy_to(self.denoiser.parameters())

    def _save(self) -> None:
        folder = self.work.checkpoints / f"checkpoint-{self.step}"
        self.accelerator.save_state(str(folder))
        self.accelerator.wait_for_everyone()  # Every process writes its random state into the checkpoint.
        if self.accelerator.is_main_process:
            self.work.complete_checkpoint(self.step, self.stopwatch.seconds)
            self.work.drop_old_checkpoints(CHECKPOINTS_KEPT)

    def _sample(self) -> None:
        """Leave a grid of what the average draws by now."""
        if not self.accelerator.is_main_process:
            return
        if self.training.ema > 0:
            self.average.store(self.denoiser.parameters())
            self.average.copy_to(self.denoiser.parameters())
        self._write_grid()
        if self.training.ema > 0:
            self.average.restore(self.denoiser.parameters())

    def _pipeline(self) -> PixelDiffusionPipeline:
        tokenizer = CLIPTokenizer.from_pretrained(self.work.path / "tokenizer")
        return pipeline_from_denoiser(self.denoiser, self.objective, tokenizer, self.training.size)

    def _write_grid(self) -> None:
        self.work.samples.mkdir(exist_ok=True)
        captions = list(self.training.sample_captions)
        noise = torch.Generator().manual_seed(SAMPLE_SEED)
        (images,) = self._pipeline()(captions, generator=noise, output_type="np", return_dict=False)  # [N, S, S, 3]
        pictures = [np.rint(image * 255).astype(np.uint8) for image in images]
        grid_from_pictures(pictures).save(self.work.samples / f"step-{self.step:06}.png")

    def write(self) -> None:
        """Write the model, its last grid and those before."""
        write_pipeline(self._pipeline(), self.work.model)
        self._write_grid()
        shutil.copytree(self.work.samples, self.work.model / "samples", dirs_exist_ok=True)


def _accelerator(precision: Precision | None) -> Accelerator:
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    # On the CPU these models are too small for bfloat16 to pay: see image_presets.py.
    chosen = precision or (best_precision(device) if device.type == "cuda" else "float32")
    AcceleratorState._reset_state()  # A run before this one may have had another precision; transformers does it, too.
    return Accelerator(cpu=device.type == "cpu", mixed_precision="bf16" if chosen == "bfloat16" else "no")
