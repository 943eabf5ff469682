"""Pretraining of a language model on text, from the data to an ordinary Hugging Face folder.

    from fmedge.training.text import TextTraining, train_text

    result = train_text(TextTraining(output=Path("model"), minutes=3))

A run of --steps is reproducible: the same options, data, package versions and machine give the same
weights, whether it was interrupted or not. A run of --minutes is not: the learning rate follows the
clock, so that it ends at zero when the time is over, on whatever machine.

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

from fmedge_runtimes.version import __version__

from fmedge.training.presets import preset_named
from fmedge.training.progress import Report, no_report
from fmedge.training.run import carry_out, require_packages, settled
from fmedge.training.run_options import check_options
from fmedge.training.schedule import Budget, CheckpointInterval

if TYPE_CHECKING:
    from fmedge.training.preparation import Preparation
    from fmedge.training.pretraining import Pretrained
    from fmedge.training.workfolder import WorkFolder


@dataclass(frozen=True, slots=True)
class TextTraining:
    """The options of a run. None means: what the preset says."""

    output: Path
    data: tuple[str, ...] = ()
    """Files, folders, or "-" for standard input; none: the text that Python itself carries."""
    field: str = "text"
    """The field of a .jsonl file's objects that holds the text."""
    preset: str = "tiny"
    config: Path | None = None
    """A transformers config.json to use in place of the preset's architecture."""
    tokenizer: Path | None = None
    """A tokenizer.json or its folder; None: train one on the data."""
    minutes: float | None = None
    steps: int | None = None
    sequence_length: int | None = None
    batch: int | None = None
    """Sequences of one step on one device."""
    learning_rate: float | None = None
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 0
    checkpoint_minutes: float = 5.0
    checkpoint_steps: int | None = None
    resume: bool = False
    """Go on with an interrupted run of the same options; no file of theirs is read again."""
    force: bool = False
    """Replace the output, and discard an interrupted run unless it is resumed."""

    def __post_init__(self) -> None:
        """Refuse what no run can use."""
        Budget(self.steps, self.minutes)
        preset_named(self.preset)
        check_options(self, {"sequence_length": 2})


@dataclass(frozen=True, slots=True)
class TextTrainingResult:
    """What a run made, and how well and how fast."""

    output: Path
    parameters: int
    vocabulary: int
    train_documents: int
    train_tokens: int
    """Of the text; a run may see each more than once, or not at all."""
    validation_tokens: int
    steps: int
    tokens_seen: int
    seconds: float
    """Of training, without reading and measuring; interruptions are not counted."""
    tokens_per_second: float
    perplexity_before: float
    perplexity_after: float
    """Per token of the held-out text, in float32, windows of the sequence length."""
    bits_per_byte: float
    """Of the held-out text, after training; comparable between tokenizers, as perplexity is not."""
    precision: str
    device: str
    devices: int


def train_text(options: TextTraining, progress: Report | None = None) -> TextTrainingResult:
    """Train, and write the output. Under torchrun every process calls this with the same options."""
    require_packages("torch", "transformers", "accelerate")
    from fmedge.training.preparation import prepare

    return carry_out(options, progress or no_report, prepare, _train)


def _train(options: TextTraining, work: WorkFolder, report: Report) -> TextTrainingResult:
    """Train what was prepared, and write all of the output but its name."""
    from fmedge.training.preparation import Preparation
    from fmedge.training.pretraining import (
        Pretraining,
        is_main_process,
        join_processes,
        pretrain,
    )

    join_processes()
    preparation = Preparation(**settled(work))
    pretraining = Pretraining(
        config=preparation.config,
        pad=preparation.pad,
        budget=Budget(options.steps, options.minutes),
        sequence_length=preparation.sequence_length,
        batch=preparation.batch,
        learning_rate=preparation.learning_rate,
        seed=options.seed,
        precision=None if options.precision == "auto" else options.precision,
    )
    interval = CheckpointInterval(options.checkpoint_minutes, options.checkpoint_steps)
    result = _result(options, preparation, pretrain(pretraining, work, interval, report))
    if is_main_process():
        work.copy_tokenizer(work.model)
        work.write_report(_report_from_run(preparation, result))
    return result


def _result(options: TextTraining, preparation: Preparation, pretrained: Pretrained) -> TextTrainingResult:
    nats = pretrained.loss_after * (preparation.validation_tokens - 1)
    return TextTrainingResult(
        output=options.output,
        parameters=pretrained.parameters,
        vocabulary=preparation.vocabulary,
        train_documents=preparation.train_documents,
        train_tokens=preparation.train_tokens,
        validation_tokens=preparation.validation_tokens,
        steps=pretrained.steps,
        tokens_seen=pretrained.tokens_seen,
        seconds=pretrained.seconds,
        tokens_per_second=pretrained.tokens_seen / pretrained.seconds,
        perplexity_before=_perplexity(pretrained.loss_before),
        perplexity_after=_perplexity(pretrained.loss_after),
        bits_per_byte=nats / math.log(2) / preparation.validation_bytes,
        precision=pretrained.precision,
        device=pretrained.device,
        devices=pretrained.devices,
    )


def _perplexity(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:  # After a run that nearly diverged.
        return math.inf


def _report_from_run(preparation: Preparation, result: TextTrainingResult) -> dict[str, object]:
    """What training.json says."""
    return {
        "versions": {
            "fmedge": __version__,
            "python": platform.python_version(),
            "torch": version("torch"),
            "transformers": version("transformers"),
        },
        "options": {
            **preparation.options,
            "sequence_length": preparation.sequence_length,
            "batch": preparation.batch,
            "learning_rate": preparation.learning_rate,
        },
        "text": {"sha256": preparation.sha256, "validation_documents": preparation.validation_documents},
        "result": {name: value for name, value in dataclasses.asdict(result).items() if name != "output"},
    }
