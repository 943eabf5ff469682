"""`fmedge build`: TensorRT engines of a bundle, on the device that is to run them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fmedge.commands.byte_size import parse_bytes, show_bytes
from fmedge.commands.kinds import parse_size

if TYPE_CHECKING:
    from fmedge_converters.engines.bundle_engines import EngineMade

EPILOG = """
[bold]Examples[/bold]

  fmedge build out/bundle

  fmedge build out/bundle --rows 4 --workspace 512MiB

  fmedge build out/images --size 512x512 --size 768x768 --batch 2

  fmedge build out/images --part unet --optimization-level 4 --force
"""


def command(
    bundle: Annotated[Path, typer.Argument(help="Folder of a bundle that was exported for TensorRT.")],
    device: Annotated[
        Literal["tensorrt", "rtx"] | None,
        typer.Option(help="Whose engines; those of the bundle's target, if not given."),
    ] = None,
    rows: Annotated[int | None, typer.Option(help="Of text: sequences that are decoded together.")] = None,
    tokens: Annotated[
        int | None,
        typer.Option(help="Of text: tokens of a prompt that go through together; of images: the longest prompt."),
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(metavar="WIDTHxHEIGHT", help="Of images; several give a range, and the first is the fastest."),
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Of images: how many are made together.")] = None,
    part: Annotated[list[str] | None, typer.Option(help="A graph to build (unet); all, if not given.")] = None,
    workspace: Annotated[
        int | None,
        typer.Option(
            parser=parse_bytes,
            metavar="SIZE",
            help="What a layer may take while it is built; what the device can spare.",
        ),
    ] = None,
    optimization_level: Annotated[
        int | None, typer.Option(help="TensorRT's, 0 (fast to build) to 5 (slow to build).")
    ] = None,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Later versions of the same TensorRT run it, too.")
    ] = False,
    hardware: Annotated[
        Literal["this", "same-compute-capability", "ampere-plus"],
        typer.Option(help="Other GPUs that run it, too (not on Jetson: ampere-plus)."),
    ] = "this",
    force: Annotated[bool, typer.Option("--force", help="Build again what is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line for each engine.")] = False,
) -> None:
    """Build TensorRT engines of a bundle, on the device that is to run them.

    They are stored in the bundle, in engines/, each beside a record of what it belongs to. An engine that is there and
    still belongs to this bundle, GPU and TensorRT is kept. Ctrl-C stops a build and leaves nothing half; what was timed
    until then is not timed again.
    """
    from fmedge_converters.engines.bundle_engines import EngineBuildOptions, build_engines
    from fmedge_converters.engines.served import Served

    from fmedge.commands.console import progress_bar

    served = Served(rows, tokens, tuple(map(parse_size, size or ())), batch)
    options = EngineBuildOptions(
        device=device,
        served=served,
        parts=tuple(part or ()),
        workspace=workspace,
        optimization_level=optimization_level,
        version_compatible=version_compatible,
        hardware=hardware,
        force=force,
    )
    with progress_bar() as progress:
        for made in build_engines(bundle, options, progress):
            _show(made, as_json=as_json)


def _show(made: EngineMade, *, as_json: bool) -> None:
    if as_json:
        import json

        record = {"name": made.name, "path": str(made.path), "seconds": made.seconds, "warnings": made.warnings}
        typer.echo(json.dumps({**record, "engine": made.facts.model_dump(mode="json")}))
        return
    how = "is there already, and belongs here" if made.seconds is None else f"built in {made.seconds:.0f} s"
    facts = made.facts
    typer.echo(
        f"{made.name}: {how}: {made.path} ({show_bytes(facts.bytes)}, {show_bytes(facts.device_memory)} to run), "
        f"{facts.library} {facts.version}, {facts.device}"
    )
    for warning in made.warnings:
        typer.secho(f"  TensorRT warns: {warning}", err=True)
