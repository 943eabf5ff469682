"""`fmedge plan`: what a bundle takes, and what fits, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fmedge.commands.byte_size import parse_bytes, show_bytes
from fmedge.commands.device_options import PrefillOption
from fmedge.commands.kinds import parse_size, refuse_others

if TYPE_CHECKING:
    from fmedge_runtimes.image_plan import ImagePlan
    from fmedge_runtimes.plan import Plan

EPILOG = """
[bold]Examples[/bold]

  fmedge plan out/bundle

  fmedge plan out/bundle --slots 8 --context 4096 --memory 6GiB

  fmedge plan out/bundle --slots 4 --json

  fmedge plan out/images --size 1024x1024 --batch 4 --memory 8GiB
"""

TEXT_OPTIONS = frozenset({"slots", "context", "prefill_graph"})
IMAGE_OPTIONS = frozenset({"size", "batch", "guidance"})
"""Parameters that only bundles of that kind take."""


def command(
    ctx: typer.Context,
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.")],
    slots: Annotated[int, typer.Option(help="Rows that are served at the same time.")] = 1,
    context: Annotated[
        int | None, typer.Option(help="Tokens of each row, prompt and completion; all that the bundle holds.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="WIDTHxHEIGHT", help="Of images, in pixels; the bundle's own.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Images that are denoised together.")] = 1,
    guidance: Annotated[float | None, typer.Option(help="Of images; above 1 doubles the rows.")] = None,
    memory: Annotated[
        int | None,
        typer.Option(
            parser=parse_bytes,
            metavar="SIZE",
            help="What it may take (6GiB); what this machine has free, if not given.",
        ),
    ] = None,
    prefill_graph: PrefillOption = "prompts",
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as one JSON line.")] = False,
) -> None:
    """Say what a bundle takes in memory, and which contexts and slots, or sizes and batches, fit. Nothing is loaded.

    Exits with 1 if what was asked for does not fit.
    """
    from fmedge_runtimes.bundle import ImageBundle, open_any_bundle
    from fmedge_runtimes.image_plan import plan_image
    from fmedge_runtimes.memory import available_bytes
    from fmedge_runtimes.plan import plan

    opened = open_any_bundle(bundle, checksums=False)
    makes_images = isinstance(opened, ImageBundle)
    refuse_others(ctx, bundle, makes_images=makes_images, others=TEXT_OPTIONS if makes_images else IMAGE_OPTIONS)
    amount = available_bytes() if memory is None else memory
    origin = "asked for" if memory is not None else "free on this machine"
    if isinstance(opened, ImageBundle):
        width, height = (None, None) if size is None else parse_size(size)
        guided = None if guidance is None else guidance > 1
        planned = plan_image(opened, height=height, width=width, batch=batch, guided=guided, memory=amount)
        _show_images(planned, origin, as_json=as_json)
        return
    found = plan(opened, slots, context, amount, prefill=prefill_graph != "off")
    if as_json:
        typer.echo(_json(found))
    else:
        _show(found, origin, opened.manifest.text.context)
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
        *_prefill(found),
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


def _prefill(found: Plan) -> list[tuple[str, str]]:
    if not found.prefill:
        return []
    return [("graph for prompts", f"{show_bytes(found.prefill)} more; --prefill-graph off leaves it out")]


def _show_images(found: ImagePlan, origin: str, *, as_json: bool) -> None:
    """Print the plan of an image bundle; exits with 1 if it does not fit in either memory mode."""
    from fmedge_runtimes.parts import MODES

    if as_json:
        import json
        from dataclasses import asdict

        modes = {mode: {"total": found.total(mode), "fits": found.fits(mode)} for mode in MODES}
        typer.echo(json.dumps({**asdict(found), "modes": modes}))
    else:
        guided = " with guidance" if found.guided else ""
        rows = [("images", f"{found.batch} of {found.width}x{found.height}{guided}")]
        for part in found.parts:
            more = f", {show_bytes(part.working)} while it runs (an estimate)" if part.working else ""
            rows.append((part.name, f"weights {show_bytes(part.weights)}{more}"))
        for mode in MODES:
            verdict = ""
            if found.memory is not None:
                short = f": {show_bytes(found.total(mode) - found.memory)} too little"
                verdict = ": it fits" if found.fits(mode) else f": it does NOT fit{short}"
            rows.append((f"total ({mode})", show_bytes(found.total(mode)) + verdict))
        amount = "unknown: this system does not say what is free; give --memory"
        rows.append(("memory", amount if found.memory is None else f"{show_bytes(found.memory)} {origin}"))
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            typer.echo(f"{name:<{width}}  {value}")
    if not any(map(found.fits, MODES)):
        raise typer.Exit(1)
