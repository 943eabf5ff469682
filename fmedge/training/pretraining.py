"""Next-token prediction with transformers.Trainer: from prepared tokens to a model's folder.

This module alone knows torch and transformers. Trainer does the stepping, the devices, the
checkpoints and their restoring; the callback here decides when to save and when to stop. Under
torchrun every process runs all of this, Trainer shares the work out, and rank 0 alone writes.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from fmedge_runtimes.errors import DataError, TrainingError
from numpy.typing import NDArray
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from fmedge.training.device import agreed, device_name, diverged, processes, reproducible
from fmedge.training.perplexity import mean_loss
from fmedge.training.precision import Precision, best_precision
from fmedge.training.progress import Progress, Report
from fmedge.training.quiet import quiet
from fmedge.training.schedule import Budget, CheckpointInterval, Stopwatch, learning_rate_factor
from fmedge.training.workfolder import Checkpoint, WorkFolder

WEIGHT_DECAY = 0.1
ADAM_BETAS = (0.9, 0.95)
LARGEST_GRADIENT_NORM = 1.0
STEPS_PER_LOSS = 10
CHECKPOINTS_KEPT = 2
"""The last one, and the one before it while the last is being written."""
NO_STEP_LIMIT = 2**40
"""For a run that its minutes end; Trainer wants a number."""


@dataclass(frozen=True, slots=True)
class Pretraining:
    """All that decides how the model is trained, the tokens aside."""

    config: dict[str, Any]
    """config.json's content."""
    pad: int
    budget: Budget
    sequence_length: int
    batch: int
    """Sequences of one step on one device."""
    learning_rate: float
    seed: int
    precision: Precision | None
    """None: the faster one of the device."""


@dataclass(frozen=True, slots=True)
class Pretrained:
    """What a run came to."""

    parameters: int
    steps: int
    tokens_seen: int
    seconds: float
    loss_before: float
    loss_after: float
    precision: Precision
    device: str
    devices: int


def checked_config(config: dict[str, Any], name: str) -> dict[str, Any]:
    """Complete a model's config with its type's defaults, and build the model once without memory."""
    content = dict(config)
    with quiet():
        try:
            complete = AutoConfig.for_model(content.pop("model_type"), **content)
            with torch.device("meta"):
                AutoModelForCausalLM.from_config(complete)
        except Exception as error:  # Each architecture has its own ways to refuse.
            reason = " ".join(str(error).split()) or type(error).__name__
            raise TrainingError(f"{name}: transformers builds no language model from it: {reason}") from error
    return {**complete.to_dict(), "model_type": complete.model_type}


def pretrain(pretraining: Pretraining, work: WorkFolder, interval: CheckpointInterval, report: Report) -> Pretrained:
    """Train from the last checkpoint or from the seed, and write the model into the work folder."""
    with quiet(), reproducible(pretraining.budget):
        arguments = _arguments(pretraining, work)
        checkpoint = _last_checkpoint(arguments, work)
        train, validation = work.read_array("train"), np.array(work.read_array("validation"))
        dataset = TokenSequences(train, pretraining.sequence_length)
        rows = arguments.train_batch_size * arguments.world_size
        _check_enough(len(dataset), rows, pretraining.sequence_length)
        model = _new_model(pretraining).to(arguments.device)
        report(Progress("measuring"))
        loss_before = mean_loss(model, validation, pretraining.sequence_length)

        pilot = _Pilot(
            budget=pretraining.budget,
            interval=interval,
            work=work,
            checkpoint=checkpoint,
            tokens_per_step=rows * pretraining.sequence_length,
            report=report,
        )
        trainer = _trainer(model, arguments, dataset, pilot, pretraining.learning_rate)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint.path))
        steps, seconds = trainer.state.global_step, pilot.stopwatch.seconds

        report(Progress("writing", fraction=1.0))
        if trainer.is_world_process_zero():
            trained = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
            _write_model(trained, work.model, pretraining.pad)
        trainer.accelerator.wait_for_everyone()
        # What is measured is what was written, so that anyone who loads it finds the same number.
        report(Progress("measuring", fraction=1.0))
        written = AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32).to(arguments.device)
        loss_after = mean_loss(written, validation, pretraining.sequence_length)
        if not math.isfinite(loss_after):
            raise diverged(steps)
        trainer.accelerator.wait_for_everyone()
    return Pretrained(
        parameters=written.num_parameters(),
        steps=steps,
        tokens_seen=steps * pilot.tokens_per_step,
        seconds=seconds,
        loss_before=loss_before,
        loss_after=loss_after,
        precision="bfloat16" if arguments.bf16 else "float32",
        device=device_name(arguments.device),
        devices=arguments.world_size * max(arguments.n_gpu, 1),
    )


class TokenSequences:
    """The training tokens cut into sequences, as a torch data set."""

    def __init__(self, tokens: NDArray[np.uint32], length: int) -> None:
        self.rows = tokens[: len(tokens) // length * length].reshape(-1, length)  # [S, T]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self.rows[index].astype(np.int64))  # [T]


class _Pilot(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Keeps the time of a run, decides when it saves and when it ends, and tells how it goes."""

    def __init__(
        self,
        *,
        budget: Budget,
        interval: CheckpointInterval,
        work: WorkFolder,
        checkpoint: Checkpoint | None,
        tokens_per_step: int,
        report: Report,
    ) -> None:
        self.budget = budget
        self.interval = interval
        self.work = work
        self.tokens_per_step = tokens_per_step
        self.report = report
        self.stopwatch = Stopwatch(before=0.0 if checkpoint is None else checkpoint.seconds)
        self.seconds = self.stopwatch.before
        """At the last step, and the same in every process: what is decided must be decided by all."""
        self.saved_at = self.seconds
        self.loss: float | None = None

    def learning_rate_factor(self, step: int) -> float:
        """For LambdaLR, which calls this after every step."""
        return learning_rate_factor(self.budget.fraction(step, self.seconds))

    def on_train_begin(self, *_: object, **__: object) -> None:
        self.stopwatch.start()

    def on_optimizer_step(self, args: TrainingArguments, *_: object, **__: object) -> None:
        self.seconds = agreed(self.stopwatch.seconds, args.device)

    def on_step_end(self, _: TrainingArguments, state: TrainerState, control: TrainerControl, **__: object) -> None:
        fraction = self.budget.fraction(state.global_step, self.seconds)
        due_by_time = self.seconds - self.saved_at >= self.interval.minutes * 60
        due_by_steps = self.interval.steps is not None and state.global_step % self.interval.steps == 0
        if fraction >= 1:
            control.should_training_stop = True
        elif due_by_time or due_by_steps:
            control.should_save = True
        rate = state.global_step * self.tokens_per_step / self.seconds
        self.report(Progress("training", fraction, state.global_step, self.seconds, rate, self.loss))

    def on_log(self, _: TrainingArguments, state: TrainerState, *__: object, **___: object) -> None:
        self.loss = state.log_history[-1].get("loss", self.loss)
        if self.loss is not None and not math.isfinite(self.loss):
            raise diverged(state.global_step)

    def on_save(self, _: TrainingArguments, state: TrainerState, *__: object, **___: object) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # Every process writes its random state into the checkpoint.
        if state.is_world_process_zero:
            self.work.complete_checkpoint(state.global_step, self.stopwatch.seconds)
        self.saved_at = self.seconds


def join_processes() -> None:
    """Wait until every process of torchrun is here; alone, do nothing."""
    processes().wait_for_everyone()


def is_main_process() -> bool:
    """Whether this process is the one that writes."""
    return bool(processes().is_main_process)


def _arguments(pretraining: Pretraining, work: WorkFolder) -> TrainingArguments:
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    precision = pretraining.precision or best_precision(device)
    try:
        return TrainingArguments(
            output_dir=str(work.checkpoints),
            max_steps=pretraining.budget.steps or NO_STEP_LIMIT,
            per_device_train_batch_size=pretraining.batch,
            max_grad_norm=LARGEST_GRADIENT_NORM,
            bf16=precision == "bfloat16",
            use_cpu=device.type == "cpu",
            seed=pretraining.seed,
            save_strategy="no",  # The pilot says when.
            save_total_limit=CHECKPOINTS_KEPT,
            logging_steps=STEPS_PER_LOSS,
            logging_nan_inf_filter=False,  # It would hide a run that diverges.
            report_to="none",
            disable_tqdm=True,
            log_level="error",
            remove_unused_columns=False,
            dataloader_drop_last=True,
            dataloader_pin_memory=device.type == "cuda",
        )
    except ValueError as error:
        raise TrainingError(f"the device {device.type} cannot train in {precision}: {error}") from error


def _last_checkpoint(arguments: TrainingArguments, work: WorkFolder) -> Checkpoint | None:
    with arguments.main_process_first(local=False):
        if arguments.process_index == 0:
            work.drop_torn_checkpoints()
    return work.last_checkpoint()


def _trainer(
    model: PreTrainedModel,
    arguments: TrainingArguments,
    dataset: TokenSequences,
    pilot: _Pilot,
    learning_rate: float,
) -> Trainer:
    optimizer = _optimizer(model, learning_rate)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=_batch_from_sequences,
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, pilot.learning_rate_factor)),
        callbacks=[pilot],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _new_model(pretraining: Pretraining) -> PreTrainedModel:
    transformers.set_seed(pretraining.seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**pretraining.config), dtype=torch.float32)


def _optimizer(model: PreTrainedModel, learning_rate: float) -> torch.optim.Optimizer:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},  # Norms and biases have no reason to be small.
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=ADAM_BETAS, fused=True)


def _batch_from_sequences(sequences: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    tokens = torch.stack(sequences)  # [B, T]
    return {"input_ids": tokens, "labels": tokens}  # The model shifts the labels itself.


def _write_model(model: PreTrainedModel, folder: Path, pad: int) -> None:
    model.config.use_cache = True  # Trainer switches it off.
    # Here, not in the config: there, Llama would freeze this token's embedding, and it is the end token.
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id, eos_token_id=model.config.eos_token_id, pad_token_id=pad
    )
    model.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        # safetensors leaves its files readable by their owner only, unlike those beside them.
        shutil.copymode(folder / "config.json", file)


def _check_enough(sequences: int, batch: int, sequence_length: int) -> None:
    if sequences < batch:
        raise DataError(
            f"too little text: it gives {sequences} training sequences of {sequence_length} tokens, and one "
            f"step takes {batch}: add text, or use a smaller --batch or --sequence-length"
        )
