"""`fmedge eval`: how good bundles are: how well they predict a text, or how well their pictures follow the captions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fmedge.commands.device_options import PrefillOption
from fmedge.commands.kinds import refuse_others

EPILOG = """
[bold]Examples[/bold]

  fmedge eval out/bundle --data held-out.txt

  fmedge eval out/int4 --data held-out.txt --against out/model --plot kl.png --record

  fmedge eval out/none out/int8 out/int4 --data held-out.txt --against out/none --plot size.png

  fmedge eval out/bundle --choices examples/questions.jsonl --chat

  fmedge eval out/images

  fmedge eval out/painter --per-combination 5 --seed 1 --steps 8 --json

  fmedge eval pictures/
"""

FOR_TEXT = frozenset(
    {
        "data",
        "tokens",
        "window",
        "stride",
        "against",
        "choices",
        "chat",
        "plot",
        "record",
        "device",
        "threads",
        "prefill_graph",
    }
)
FOR_IMAGES = frozenset({"per_combination", "seed", "steps", "guidance", "batch"})


def command(
    ctx: typer.Context,
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="SOURCE...",
            help="Text bundles, or decoders of optimum or onnxruntime-genai, side by side; or one image bundle, folder "
            "of a trained text-to-image model (with torch), or folder of pictures with captions, as `fmedge train "
            "image --data` takes them.",
        ),
    ],
    data: Annotated[
        Path | None,
        typer.Option(help="Text: a UTF-8 file, - for stdin; a page of Python's own documentation unless given."),
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=2, help="Text: stop after so many tokens of it.")] = None,
    window: Annotated[
        int | None, typer.Option(min=2, help="Text: tokens that a model sees together; 512, or its context if shorter.")
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(min=1, help="Text: tokens from one window to the next, which are scored; half a window."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Text: compare distributions with an original: another bundle, or what `fmedge export` takes (with "
            "torch).",
        ),
    ] = None,
    choices: Annotated[
        Path | None,
        typer.Option(
            help="Text: answer the multiple-choice questions of a .jsonl file, in place of the text unless "
            "--data is given, too."
        ),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Text: ask --choices as turns of a chat.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(help="Text: draw perplexity against size, or for one bundle its KL by position (.png, .svg)."),
    ] = None,
    record: Annotated[
        bool, typer.Option("--record", help="Text: write the figures into the bundles' manifests, as evidence.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="Text: cpu or cuda; the bundle's target unless given.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Text: threads of the CPU; all cores unless given.")
    ] = None,
    prefill_graph: PrefillOption = "prompts",
    per_combination: Annotated[int, typer.Option(min=1, help="Images: pictures of each of the 180 captions.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Images: of the first picture; the next ones count up.")] = 0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Images: steps of a picture; the model's own without it.")
    ] = None,
    guidance: Annotated[float | None, typer.Option(help="Images: guidance scale; the model's own without it.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images: pictures made together.")] = 60,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON line.")] = False,
) -> None:
    """Say how good bundles are.

    Text: perplexity and bits per byte of a text, and with --against how far a bundle is from its original. Each window
    of the text scores what no window before it has scored.

    Images: how many pictures show what their captions say: size, colour, shape and position of the built-in captions. A
    rule reads the pictures; it is right for every picture that the training data draws. Combinations that
    `fmedge train image` never sees are counted apart.
    """
    from dataclasses import asdict

    makes_images = [_makes_images(source) for source in sources]
    for source, images in zip(sources, makes_images, strict=True):
        refuse_others(ctx, source, makes_images=images, others=FOR_TEXT if images else FOR_IMAGES)
    if not any(makes_images):
        from fmedge.commands.text_eval import TextEval, evaluate_texts

        evaluate_texts(
            TextEval(
                tuple(sources),
                data=data,
                tokens=tokens,
                window=window,
                stride=stride,
                against=against,
                choices=choices,
                chat=chat,
                plot=plot,
                record=record,
                device=device,
                threads=threads,
                prefill_graph=prefill_graph,
            ),
            as_json=as_json,
        )
        return
    if len(sources) > 1:
        raise typer.BadParameter("what makes images is evaluated alone; give one folder at a time.")
    from fmedge.commands.pictures import judge_pictures, show_pictures

    accuracy = judge_pictures(
        sources[0], per_combination=per_combination, seed=seed, steps=steps, guidance=guidance, batch=batch
    )
    if as_json:
        typer.echo(json.dumps({"source": str(sources[0]), **asdict(accuracy)}))
    else:
        show_pictures(accuracy)


def _makes_images(source: Path) -> bool:
    """Whether a folder is for the rules of pictures. Raises SourceError for none, or a text model that is no bundle."""
    from fmedge_runtimes.errors import SourceError
    from fmedge_runtimes.foreign import find_foreign
    from fmedge_runtimes.load import kind_of

    if not source.exists():
        raise SourceError(f"{source}: there is no such folder; give that of a bundle.")
    if (source / "fmedge.json").is_file() or (source.is_dir() and find_foreign(source) is not None):
        return kind_of(source) == "image"
    if (source / "config.json").is_file() and not (source / "model_index.json").is_file():
        raise SourceError(
            f"{source} is a model of transformers and no bundle; `fmedge export` it, and give it to --against."
        )
    return True
