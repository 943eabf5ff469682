"""fmedge train: pretraining on one's own data."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fmedge.commands.console import progress_bar
from fmedge.training.presets import PRESETS
from fmedge.training.text import TextTraining, TextTrainingResult, train_text

if TYPE_CHECKING:
    from fmedge.training.progress import Progress, Report

app = typer.Typer(
    name="train",
    help="Train a model from scratch, into an ordinary Hugging Face folder.",
    no_args_is_help=True,
)

PARTS = 1000
"""Of the progress bar."""

DEFAULT: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(TextTraining)}


@app.callback()
def train() -> None:
    """Keep `text` a command of its own name, as long as it is the only one."""


@app.command()
def text(
    output: Annotated[Path, typer.Argument(help="The folder to write.")],
    *,
    data: Annotated[
        list[str],
        typer.Option(
            help="A text file, a .jsonl file, a folder of .txt, .md and .jsonl files, or - for standard "
            "input; repeatable. Without it, the documentation that Python itself carries.",
            show_default=False,
        ),
    ] = DEFAULT["data"],
    field: Annotated[str, typer.Option(help="The field of a .jsonl file that holds the text.")] = DEFAULT["field"],
    preset: Annotated[str, typer.Option(help=f"The size of the model: {', '.join(PRESETS)}.")] = DEFAULT["preset"],
    config: Annotated[
        Path | None, typer.Option(help="A transformers config.json, in place of the preset's architecture.")
    ] = DEFAULT["config"],
    tokenizer: Annotated[
        Path | None, typer.Option(help="A tokenizer.json or its folder, in place of one trained on the data.")
    ] = DEFAULT["tokenizer"],
    minutes: Annotated[float | None, typer.Option(help="Train for this long.")] = DEFAULT["minutes"],
    steps: Annotated[
        int | None, typer.Option(help="Train for so many steps; the same seed then gives the same weights.")
    ] = DEFAULT["steps"],
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens of a training sequence; the preset's without it.")
    ] = DEFAULT["sequence_length"],
    batch: Annotated[
        int | None, typer.Option(help="Sequences of a step on one device; the preset's without it.")
    ] = DEFAULT["batch"],
    learning_rate: Annotated[float | None, typer.Option(help="At its highest; the preset's without it.")] = DEFAULT[
        "learning_rate"
    ],
    precision: Annotated[
        Literal["auto", "float32", "bfloat16"],
        typer.Option(help="auto: bfloat16 where the device has it in hardware."),
    ] = DEFAULT["precision"],
    seed: Annotated[int, typer.Option(help="For the first weights and the order of the data.")] = DEFAULT["seed"],
    checkpoint_minutes: Annotated[float, typer.Option(help="How much training a kill may cost, in minutes.")] = DEFAULT[
        "checkpoint_minutes"
    ],
    checkpoint_steps: Annotated[int | None, typer.Option(help="The same in steps; whichever comes first.")] = DEFAULT[
        "checkpoint_steps"
    ],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run; repeat its other options.")
    ] = DEFAULT["resume"],
    force: Annotated[
        bool, typer.Option("--force", help="Replace OUTPUT; without --resume, discard an interrupted run.")
    ] = DEFAULT["force"],
    json_: Annotated[bool, typer.Option("--json", help="Print the result as one line of JSON.")] = False,
) -> None:
    """Train a language model on text, by predicting the next token.

    While it runs, OUTPUT.training beside OUTPUT holds its checkpoints. OUTPUT appears at the end.
    """
    options = TextTraining(
        output=output,
        data=tuple(data),
        field=field,
        preset=preset,
        config=config,
        tokenizer=tokenizer,
        minutes=minutes,
        steps=steps,
        sequence_length=sequence_length,
        batch=batch,
        learning_rate=learning_rate,
        precision=precision,
        seed=seed,
        checkpoint_minutes=checkpoint_minutes,
        checkpoint_steps=checkpoint_steps,
        resume=resume,
        force=force,
    )
    first = int(os.environ.get("RANK", "0")) == 0  # Under torchrun, one process speaks for all.
    with progress_bar() if first else contextlib.nullcontext() as bar:
        result = train_text(options, None if bar is None else _report_from_bar(bar))
    if first:
        typer.echo(json.dumps({**dataclasses.asdict(result), "output": str(output)}) if json_ else _summary(result))


def _report_from_bar(bar: Callable[[str, int, int], None]) -> Report:
    def report(progress: Progress) -> None:
        stage: str = progress.phase
        if progress.phase == "training":
            stage += f", step {progress.step}"
            stage += f", {progress.tokens_per_second:.0f} tokens/s"
        if progress.loss is not None:
            stage += f", loss {progress.loss:.3f}"
        bar(stage, round(progress.fraction * PARTS), PARTS)

    return report


def _summary(result: TextTrainingResult) -> str:
    return (
        f"{result.output}: {result.parameters / 1e6:.1f} M parameters, vocabulary {result.vocabulary}\n"
        f"  trained {result.steps} steps, {result.tokens_seen} tokens in {result.seconds:.0f} s "
        f"({result.tokens_per_second:.0f} tokens/s, {result.precision} on {result.device})\n"
        f"  perplexity {result.perplexity_before:.0f} before, {result.perplexity_after:.2f} after "
        f"({result.bits_per_byte:.3f} bits per byte)"
    )
