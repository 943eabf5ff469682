"""Amounts of memory as people write them: 6GiB, 512M, 1.5 GB."""

from __future__ import annotations

import re

import typer

UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
PATTERN = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?B?)", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """Bytes of "6GiB" or "6G" (powers of 1024), "6GB" (powers of 1000), or a plain number of bytes.

    Raises a usage error for anything else.
    """
    found = PATTERN.fullmatch(text.strip())
    if found is None or (not found[2] and found[3].upper() not in ("", "B")):
        raise typer.BadParameter(f"{text!r} is no amount of memory; write 6GiB, 512MiB or a number of bytes.")
    base: int = 1000 if found[2] and found[3].upper() == "B" else 1024
    amount = round(float(found[1]) * float(base ** UNITS[found[2].upper()]))
    if amount <= 0:
        raise typer.BadParameter(f"{text!r} is no memory at all; write 6GiB, 512MiB or a number of bytes.")
    return amount


def show_bytes(amount: int) -> str:
    """An amount in the largest unit of 1024 of which it has one whole."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if amount >= 1024**power:
            return f"{amount / 1024**power:.1f} {unit}"
    return f"{amount} B"
