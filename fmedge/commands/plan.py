"""`fmedge plan`: what a bundle takes, and what fits, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fmedge.commands.byte_size import parse_bytes, show_bytes

if TYPE_CHECKING:
    from fmedge_runtimes.plan import Plan

EPILOG = """
[bold]Examples[/bold]

  fmedge plan out/bundle

  fmedge plan out/bundle --slots 8 --context 4096 --memory 6GiB

  fmedge plan out/bundle --slots 4 --json
"""


def command(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.")],
    slots: Annotated[int, typer.Option(help="Rows that are served at the same time.")] = 1,
    context: Annotated[
        int | None, typer.Option(help="Tokens of each row, prompt and completion; all that the bundle holds.")
    ] = None,
    memory: Annotated[
        int | None,
        typer.Option(
            parser=parse_bytes,
            metavar="SIZE",
            help="What it may take (6GiB); what this machine has free, if not given.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as one JSON line.")] = False,
) -> None:
    """Say what a bundle takes in memory, and which contexts and slots fit. Nothing is loaded.

    Exits with 1 if what was asked for does not fit.
    """
    from fmedge_runtimes.bundle import open_bundle
    from fmedge_runtimes.memory import available_bytes
    from fmedge_runtimes.plan import plan

    opened = open_bundle(bundle, checksums=False)
    found = plan(opened, slots, context, available_bytes() if memory is None else memory)
    if as_json:
        typer.echo(_json(found))
    else:
        _show(found, "asked for" if memory is not None else "free on this machine", opened.manifest.text.context)
    if not found.fits:
        raise typer.Exit(1)


def _json(found: Plan) -> str:
    import json
    from dataclasses import asdict

    return json.dumps({**asdict(found), "total": found.total, "fits": found.fits})


def _show(found: Plan, origin: str, most: int) -> None:
    rows = [
        ("slots", f"{found.slots}, of {found.context} tokens each"),
        ("weights", show_bytes(found.weights)),
        ("working memory", f"{show_bytes(found.working)} (an estimate)"),
        ("cache", show_bytes(found.cache)),
        ("states", show_bytes(found.states)),
        ("total", show_bytes(found.total)),
    ]
    if found.memory is None:
        rows.append(("memory", "unknown: this system does not say what is free; give --memory"))
    else:
        verdict = "it fits" if found.fits else f"it does NOT fit: {show_bytes(found.total - found.memory)} too little"
        rows.append(("memory", f"{show_bytes(found.memory)} {origin}: {verdict}"))
        longest = found.largest_context
        whole = ", the whole of it" if longest == most else ""
        rows.append(("largest context", f"{longest} tokens{whole}" if longest else f"none with {found.slots} slots"))
        rows.append(("largest slots", f"{found.largest_slots or 'none'} with {found.context} tokens each"))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        typer.echo(f"{name:<{width}}  {value}")
