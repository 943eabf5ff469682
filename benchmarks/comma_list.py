"""Lists as one types them on a command line: values with commas between."""

from __future__ import annotations


def words(text: str) -> tuple[str, ...]:
    """sd15,shapes"""
    return tuple(text.split(","))


def integers(text: str) -> tuple[int, ...]:
    """1,8,64"""
    return tuple(int(part) for part in text.split(","))


def numbers(text: str) -> tuple[float, ...]:
    """0.5,2"""
    return tuple(float(part) for part in text.split(","))
