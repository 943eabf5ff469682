"""`fmedge check`: will TensorRT take this bundle? Asked before the device is reached."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from fmedge_converters.preflight.check import Checked, GraphChecked
    from fmedge_converters.preflight.rule import Finding

EPILOG = """
[bold]Examples[/bold]

  fmedge check out/bundle

  fmedge check out/bundle --target orin-nano-8gb

  fmedge check out/bundle --target jetpack-7.2 --json

  fmedge check model.onnx --target 10.3 --axis batch=1:1:8
"""

MARKS = {True: "yes", False: "NO", None: "-"}
MOST = 12
"""Lines of findings for each graph; --json has all of them."""


def command(
    bundle: Annotated[Path, typer.Argument(help="Folder of a bundle, or any ONNX file.")],
    target: Annotated[
        str | None,
        typer.Option(
            help="tensorrt, tensorrt-compat, rtx; a version (10.3, 11); jetpack-6.2; or a device (orin-nano-8gb). The "
            "bundle's own, if not given."
        ),
    ] = None,
    up_to: Annotated[
        Literal["rules", "parse", "build"],
        typer.Option(help="How far to go; the last two with TensorRT-RTX, if it is here."),
    ] = "build",
    axis: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=LEAST:USUAL:MOST", help="Of an ONNX file: the sizes of a dynamic axis."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as one JSON line.")] = False,
) -> None:
    """Say whether TensorRT takes a bundle or an ONNX file, and whether it computes what it should; no GPU is needed.

    First by rules for each version, then with the parser and builder of TensorRT-RTX where that is installed. Exits
    with 1 if something would fail, naming the node and what to do.
    """
    from fmedge.commands.console import progress_bar
    from fmedge.extras import require_onnx

    require_onnx()
    from fmedge_converters.preflight.check import CheckOptions, check

    options = CheckOptions(target=target, up_to=up_to, axes=dict(map(_axis, axis or ())))
    with progress_bar() as progress:
        found = check(bundle, options, progress)
    if as_json:
        typer.echo(_json(found))
    else:
        _show(found)
    if not found.passed:
        raise typer.Exit(1)


def _axis(text: str) -> tuple[str, tuple[int, int, int]]:
    name, _, sizes = text.partition("=")
    parts = sizes.split(":")
    if not name or len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
        raise typer.BadParameter(f"--axis is {text!r}; write NAME=LEAST:USUAL:MOST, like batch=1:1:8.")
    least, usual, most = map(int, parts)
    if not least <= usual <= most:
        raise typer.BadParameter(f"--axis is {text!r}; the sizes must not fall.")
    return name, (least, usual, most)


def _json(found: Checked) -> str:
    import json
    from dataclasses import asdict

    graphs = [{**asdict(graph), "file": str(graph.file), "passed": graph.passed} for graph in found.graphs]
    version = {"name": found.asked.version.name, "rtx": found.asked.version.rtx, "asked": found.asked.name}
    return json.dumps({"passed": found.passed, "level": found.level, "version": version, "graphs": graphs})


def _show(found: Checked) -> None:
    version = found.asked.version
    typer.echo(f"checked for {version} ({version.software}), asked for as {found.asked.name}")
    for graph in found.graphs:
        typer.echo(f"\n{graph.name} ({graph.file.name})")
        _show_findings(graph)
        width = max(len(level.name) for level in graph.levels)
        for level in graph.levels:
            typer.echo(f"  {level.name:<{width}}  {MARKS[level.reached]:<3}  {level.how}")
    typer.echo(f"\nlevel reached: {found.level or 'none'}")


def _show_findings(graph: GraphChecked) -> None:
    """What was found, the same things together."""
    alike: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in graph.findings:
        alike.setdefault((finding.rule, finding.operator, finding.message), []).append(finding)
    for findings in list(alike.values())[:MOST]:
        more = f" (and {len(findings) - 1} more like it)" if len(findings) > 1 else ""
        typer.echo(f"  {findings[0].effect}: {findings[0]}{more}")
    if len(alike) > MOST:
        typer.echo(f"  and {len(alike) - MOST} more: --json lists all")
