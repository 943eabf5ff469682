"""fmedge train: models from scratch, on one's own data."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fmedge.commands.console import progress_bar
from fmedge.training.image import ImageTraining, ImageTrainingResult, ObjectiveName, train_image
from fmedge.training.image_presets import IMAGE_PRESETS
from fmedge.training.presets import PRESETS
from fmedge.training.text import TextTraining, TextTrainingResult, train_text

if TYPE_CHECKING:
    from fmedge.training.progress import Progress, Report

app = typer.Typer(
    name="train",
    help="Train a model from scratch, into an ordinary transformers or diffusers folder.",
    no_args_is_help=True,
)

PARTS = 1000
"""Of the progress bar."""

DEFAULT: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(TextTraining)}
IMAGE: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(ImageTraining)}


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
    with _progress("tokens") as report:
        result = train_text(options, report)
    _print(result, lambda: _text_summary(result), as_json=json_)


@app.command()
def image(
    output: Annotated[Path, typer.Argument(help="The folder to write.")],
    *,
    data: Annotated[
        Path | None,
        typer.Option(
            help="A folder of pictures with captions: a metadata.jsonl of file_name and text, or a .txt beside each "
            "picture. Without it, coloured shapes that are drawn here.",
        ),
    ] = IMAGE["data"],
    size: Annotated[int, typer.Option(help="Pixels of a picture's side.")] = IMAGE["size"],
    objective: Annotated[
        ObjectiveName,
        typer.Option(help="Rectified flow or DDPM, and what the model predicts: x is the picture, v the velocity."),
    ] = IMAGE["objective"],
    preset: Annotated[str, typer.Option(help=f"The size of the model: {', '.join(IMAGE_PRESETS)}.")] = IMAGE["preset"],
    minutes: Annotated[float | None, typer.Option(help="Train for this long.")] = IMAGE["minutes"],
    steps: Annotated[
        int | None, typer.Option(help="Train for so many steps; the same seed then gives the same weights.")
    ] = IMAGE["steps"],
    batch: Annotated[
        int | None, typer.Option(help="Pictures of a step on one device; the preset's without it.")
    ] = IMAGE["batch"],
    learning_rate: Annotated[float | None, typer.Option(help="At its highest; the preset's without it.")] = IMAGE[
        "learning_rate"
    ],
    caption_dropout: Annotated[
        float, typer.Option(help="The share of captions left out, so that guidance can be used.")
    ] = IMAGE["caption_dropout"],
    ema: Annotated[
        float, typer.Option(help="What a step keeps of the average of the weights that is written; 0: no average.")
    ] = IMAGE["ema"],
    precision: Annotated[
        Literal["auto", "float32", "bfloat16"], typer.Option(help="auto: bfloat16 on a GPU that has it.")
    ] = IMAGE["precision"],
    seed: Annotated[int, typer.Option(help="For the first weights, the order of the data and the noise.")] = IMAGE[
        "seed"
    ],
    sample_minutes: Annotated[
        float, typer.Option(help="Draw a grid of pictures so often, into OUTPUT.training/samples; 0: at the end only.")
    ] = IMAGE["sample_minutes"],
    checkpoint_minutes: Annotated[float, typer.Option(help="How much training a kill may cost, in minutes.")] = IMAGE[
        "checkpoint_minutes"
    ],
    checkpoint_steps: Annotated[int | None, typer.Option(help="The same in steps; whichever comes first.")] = IMAGE[
        "checkpoint_steps"
    ],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run; repeat its other options.")
    ] = IMAGE["resume"],
    force: Annotated[
        bool, typer.Option("--force", help="Replace OUTPUT; without --resume, discard an interrupted run.")
    ] = IMAGE["force"],
    json_: Annotated[bool, typer.Option("--json", help="Print the result as one line of JSON.")] = False,
) -> None:
    """Train a text-to-image diffusion model on pictures with captions.

    While it runs, OUTPUT.training beside OUTPUT holds its checkpoints and grids of samples. OUTPUT appears at the end.
    `fmedge eval OUTPUT` says how well it draws the built-in captions.
    """
    options = ImageTraining(
        output=output,
        data=data,
        size=size,
        objective=objective,
        preset=preset,
        minutes=minutes,
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        caption_dropout=caption_dropout,
        ema=ema,
        precision=precision,
        seed=seed,
        sample_minutes=sample_minutes,
        checkpoint_minutes=checkpoint_minutes,
        checkpoint_steps=checkpoint_steps,
        resume=resume,
        force=force,
    )
    with _progress("pictures") as report:
        result = train_image(options, report)
    _print(result, lambda: _image_summary(result), as_json=json_)


def _is_first() -> bool:
    return int(os.environ.get("RANK", "0")) == 0  # Under torchrun, one process speaks for all.


@contextlib.contextmanager
def _progress(unit: str) -> Iterator[Report | None]:
    if not _is_first():
        yield None
        return
    with progress_bar() as bar:
        yield _report_from_bar(bar, unit)


def _print(result: TextTrainingResult | ImageTrainingResult, summary: Callable[[], str], *, as_json: bool) -> None:
    if _is_first():
        record = {**dataclasses.asdict(result), "output": str(result.output)}
        typer.echo(json.dumps(record) if as_json else summary())


def _report_from_bar(bar: Callable[[str, int, int], None], unit: str) -> Report:
    def report(progress: Progress) -> None:
        stage: str = progress.phase
        if progress.phase == "training":
            stage += f", step {progress.step}"
            stage += f", {progress.rate:.0f} {unit}/s"
        if progress.loss is not None:
            stage += f", loss {progress.loss:.3f}"
        bar(stage, round(progress.fraction * PARTS), PARTS)

    return report


def _text_summary(result: TextTrainingResult) -> str:
    return (
        f"{result.output}: {result.parameters / 1e6:.1f} M parameters, vocabulary {result.vocabulary}\n"
        f"  trained {result.steps} steps, {result.tokens_seen} tokens in {result.seconds:.0f} s "
        f"({result.tokens_per_second:.0f} tokens/s, {result.precision} on {result.device})\n"
        f"  perplexity {result.perplexity_before:.0f} before, {result.perplexity_after:.2f} after "
        f"({result.bits_per_byte:.3f} bits per byte)"
    )


def _image_summary(result: ImageTrainingResult) -> str:
    cut = f", {result.captions_cut} captions cut" if result.captions_cut else ""
    return (
        f"{result.output}: {result.parameters / 1e6:.1f} M parameters, {result.train_pictures} pictures{cut}\n"
        f"  trained {result.steps} steps, {result.pictures_seen} pictures in {result.seconds:.0f} s "
        f"({result.pictures_per_second:.0f} pictures/s, {result.precision} on {result.device})\n"
        f"  loss {result.loss_before:.4f} before, {result.loss_after:.4f} after; "
        f"what it draws: {result.output / 'samples'}"
    )
