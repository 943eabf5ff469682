"""`fmedge doctor`: what this machine is, and what of fmedge and of a bundle can run on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fmedge_runtimes.doctor.finding import Finding

EPILOG = """
[bold]Examples[/bold]

  fmedge doctor

  fmedge doctor out/bundle

  fmedge doctor --json

  fmedge doctor --root recorded/orin-nano
"""

COLOURS = {"NOTE": typer.colors.CYAN, "WARNING": typer.colors.YELLOW, "PROBLEM": typer.colors.RED}


def command(
    bundle: Annotated[
        Path | None, typer.Argument(help="Folder of a bundle: say which of its artifacts can run here.")
    ] = None,
    root: Annotated[
        Path, typer.Option(help="Files of another machine (/etc, /proc, /usr/lib ...), to be looked at as they are.")
    ] = Path("/"),
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as one JSON line.")] = False,
) -> None:
    """Look at this machine: board, JetPack, GPU, CUDA, TensorRT, ONNX Runtime, memory. Nothing is changed.

    What can crash is asked in a child process. Exits with 1 if something cannot work as it is.
    """
    from fmedge_runtimes.doctor.finding import Level
    from fmedge_runtimes.doctor.machine import examine
    from fmedge_runtimes.doctor.report import report
    from fmedge_runtimes.errors import RequestError

    if not root.is_dir():
        raise RequestError(f"--root {root} is not a folder; give one that holds a machine's etc, proc, usr and so on.")
    findings = report(examine(root.absolute()), bundle)
    worst = max(finding.level for finding in findings)
    if as_json:
        lines = [
            {
                "section": finding.section,
                "name": finding.name,
                "value": finding.value,
                "level": finding.level.name.lower(),
                "advice": finding.advice,
            }
            for finding in findings
        ]
        typer.echo(json.dumps({"worst": worst.name.lower(), "findings": lines}))
    else:
        _show(findings)
    if worst == Level.PROBLEM:
        raise typer.Exit(1)


def _show(findings: list[Finding]) -> None:
    width = max(len(finding.name) for finding in findings)
    section = ""
    for finding in findings:
        if finding.section != section:
            section = finding.section
            typer.secho(f"{section}", bold=True)
        mark = "" if not finding.level else f"[{finding.level.name.lower()}] "
        typer.echo(f"  {finding.name:<{width}}  ", nl=False)
        typer.secho(f"{mark}", fg=COLOURS.get(finding.level.name), nl=False)
        typer.echo(finding.value)
        if finding.advice:
            typer.echo(f"  {'':<{width}}  -> {finding.advice}")
