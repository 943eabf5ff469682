"""`fmedge verify`: is this bundle whole, and does this machine compute what it should?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.")],
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, tensorrt or rtx; the bundle's target unless given.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON line.")] = False,
) -> None:
    """Check every byte of a bundle and replay its golden continuations, or images, on this machine."""
    import json

    from fmedge_runtimes.verify import verify

    from fmedge.commands.console import progress_bar

    with progress_bar() as progress:
        result = verify(bundle, device, progress)
    if as_json:
        record = {"files": result.files, "bytes": result.nbytes, "golden_tokens": result.tokens}
        more = {"near_ties": result.near_ties, "golden_images": result.images, "device": result.device}
        typer.echo(json.dumps({**record, **more}))
        return
    typer.echo(f"{result.files} files, {result.nbytes / 1e6:.1f} MB: every checksum is right")
    if result.images:
        typer.echo(f"{result.images} golden images reproduced on {result.device}")
        return
    if result.tokens == 0:
        typer.echo("the bundle has nothing golden (it was exported without --verify full): nothing to replay")
        return
    ties = f", {result.near_ties} of them near ties that fell the other way" if result.near_ties else ""
    typer.echo(f"{result.tokens} golden tokens reproduced on {result.device}{ties}")
