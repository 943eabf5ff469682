"""Options of commands that take bundles of both kinds, those that write text and those that make images."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from pathlib import Path

import typer


def refuse_others(ctx: typer.Context, bundle: Path, *, makes_images: bool, others: AbstractSet[str]) -> None:
    """Raise a usage error if one of `others` was given: parameters that are for bundles of the other kind."""
    for parameter in ctx.command.params:
        source = ctx.get_parameter_source(str(parameter.name))
        if parameter.name in others and source is not None and source.name == "COMMANDLINE":
            own, other = ("makes images", "write text") if makes_images else ("writes text", "make images")
            raise typer.BadParameter(f"{parameter.opts[0]} is for bundles that {other}; {bundle} {own}.")


def parse_size(text: str) -> tuple[int, int]:
    """Width and height of "512x768". Raises a usage error for anything else."""
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise typer.BadParameter(f"--size is {text!r}; write WIDTHxHEIGHT, like 512x512.")
    return int(width), int(height)
